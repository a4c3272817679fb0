"""Training pictures change their size at exact steps, and a resumed run draws the patches that it would have drawn."""

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from testing import sized_ranks, tiny_models
from testing.faulty_run import STEPS, make_trainer
from testing.launched import on_ranks
from testing.tiny_recipe import tiny_recipe
from transformers import TrainerCallback

from hf_dissect import DissectTrainer, DissectTrainingArguments, SelectionCollator
from hf_dissect.models.loading import freeze_tower
from hf_dissect.runs.run import run_recipe

SCHEDULE = {0.0: 16, 0.4: 32}
FIRST_OF_FULL_SIZE = 7  # of 16 steps, the first that is not before 0.4 * 16 = 6.4


class Interrupt(TrainerCallback):
    """Ends a run after a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


class RecordingTrainer(DissectTrainer):
    """Notes the size of the pictures of each step, in training and in evaluation."""

    def training_step(self, model, inputs, *arguments, **keywords):
        size = inputs["pixel_values"].shape[-1]
        self.__dict__.setdefault("sizes", []).append((self.state.global_step, size))
        return super().training_step(model, inputs, *arguments, **keywords)

    def prediction_step(self, model, inputs, *arguments, **keywords):
        self.__dict__.setdefault("evaluated", set()).add(inputs["pixel_values"].shape[-1])
        return super().prediction_step(model, inputs, *arguments, **keywords)


CASES = {
    "one process, evaluation": dict(eval_strategy="steps", eval_steps=2),
    "two workers": dict(dataloader_num_workers=2),
    "persistent workers that read ahead, accumulation": dict(
        dataloader_num_workers=2,
        dataloader_persistent_workers=True,
        dataloader_prefetch_factor=4,
        gradient_accumulation_steps=3,
    ),
    "stream": dict(stream=True, gradient_accumulation_steps=2),
    "stream, two workers": dict(stream=True, dataloader_num_workers=2),
    "a plan": dict(selection_rescore_every=2, selection_strategy="small_loss", selection_options=None),
    "a plan, stream, two workers": dict(
        stream=True,
        dataloader_num_workers=2,
        selection_rescore_every=2,
        selection_strategy="small_loss",
        selection_options=None,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_size_changes_at_its_step(case, tmp_path):
    trainer = make_trainer(tmp_path, RecordingTrainer, image_size=SCHEDULE, save_strategy="no", **CASES[case])
    trainer.train()
    assert trainer.sizes == sorted(trainer.sizes) and {step for step, _ in trainer.sizes} == set(range(STEPS))
    assert {size for step, size in trainer.sizes if step < FIRST_OF_FULL_SIZE} == {16}
    assert {size for step, size in trainer.sizes if step >= FIRST_OF_FULL_SIZE} == {32}
    logged = {entry["step"]: entry["image_size"] for entry in trainer.state.log_history if "image_size" in entry}
    assert logged == {4: 16, 8: 32, 12: 32, 16: 32}
    trainer.evaluate()
    assert trainer.evaluated == {32}
    assert trainer.model.config.vision_config.image_size == 32


RESUMED = {
    "sizes, two workers": dict(image_size=SCHEDULE, dataloader_num_workers=2, stop=5),
    "sizes, accumulation, full size from the step of the checkpoint": dict(
        image_size={0: 16, 9 / 16: 32}, gradient_accumulation_steps=2, stop=11
    ),
    "sizes, stream, two workers, patches": dict(
        image_size=SCHEDULE, stream=True, dataloader_num_workers=2, patch_dropout=0.5, stop=5
    ),
    "patches, GradCache": dict(patch_dropout=0.5, grad_cache_chunk_size=3, stop=11),
    "cheap scoring": dict(scoring_image_size=16, scoring_exposure=0.3, stop=11),
}


@pytest.mark.parametrize("case", RESUMED)
def test_a_resumed_run_is_the_uninterrupted_one(case, tmp_path):
    settings = dict(RESUMED[case])
    stop = settings.pop("stop")
    whole = make_trainer(tmp_path / "whole", RecordingTrainer, **settings)
    whole.train()
    interrupted = make_trainer(tmp_path / "run", RecordingTrainer, **settings)
    interrupted.add_callback(Interrupt(stop))
    with pytest.raises(KeyboardInterrupt):
        interrupted.train()
    resumed = make_trainer(tmp_path / "run", RecordingTrainer, **settings)
    resumed.train(resume_from_checkpoint=True)
    first = resumed.sizes[0][0]
    assert first == stop // 3 * 3 and resumed.sizes == [entry for entry in whole.sizes if entry[0] >= first]
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name
    assert torch.equal(
        whole.ledger.column("correlation").nan_to_num(-1), resumed.ledger.column("correlation").nan_to_num(-1)
    )


def test_patches_are_dropped_in_training_alone_and_the_model_is_the_plain_one(tmp_path):
    trainer = make_trainer(tmp_path, patch_dropout=0.5, max_steps=2, save_steps=2, eval_strategy="steps", eval_steps=1)
    lengths = {True: set(), False: set()}
    encoder = trainer.model.vision_model.encoder
    note = lambda module, args, kwargs: lengths[module.training].add(kwargs["inputs_embeds"].shape[1])  # noqa: E731
    encoder.register_forward_pre_hook(note, with_kwargs=True)
    trainer.train()
    assert lengths == {True: {1 + 2}, False: {1 + 4}}  # scoring and evaluation run in evaluation mode
    trainer.model.train()(**tiny_models.tiny_inputs(trainer.model, trainer.processing_class, tiny_models.CAPTIONS[:4]))
    assert lengths[True] == {3, 5}, "when training has ended, the model drops nothing any more"
    plain, _ = tiny_models.tiny_clip()
    plain.save_pretrained(tmp_path / "plain")
    saved, wanted = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("checkpoint-2", "plain"))
    assert saved["vision_config"] == wanted["vision_config"]
    assert load_file(tmp_path / "checkpoint-2" / "model.safetensors").keys() == plain.state_dict().keys()


def test_two_processes_change_size_together(tmp_path):
    on_ranks([2], tmp_path, partial(sized_ranks.train_by_sizes, tmp_path))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert first["map"] == first["stream"] == [[step, 16 if step < 3 else 32] for step in range(6)]


def test_a_recipe_reports_its_sizes(tmp_path):
    recipe = tiny_recipe(
        tmp_path / "run",
        model={"patch_dropout": 0.25},
        data={"image_size": {0.0: 16, 0.5: 32}},
        selection={"scoring_patch_dropout": 0.5},
    )
    metrics = run_recipe(recipe)
    assert metrics["settings"]["image_size"] == {"0": 16, "0.5": 32} and metrics["settings"]["patch_dropout"] == 0.25
    assert metrics["settings"]["scoring_patch_dropout"] == 0.5
    page = (tmp_path / "run" / "report.html").read_text()
    card = (tmp_path / "run" / "README.md").read_text()
    assert "image_size" in page and "image_size" in card and "patch_dropout" in card
    again = tiny_recipe(tmp_path / "run").load(tmp_path / "run" / "recipe.yaml")
    assert again.data.image_size == {0.0: 16, 0.5: 32}


def make(model_of, tmp_path, collator=None, **settings):
    model, processor = model_of()
    if settings.pop("frozen", False):
        freeze_tower(model, "vision")
    reference = model_of()[0] if settings.pop("reference_model", False) else None
    args = {"per_device_train_batch_size": 8, "max_steps": 2, "report_to": "none", "use_cpu": True, **settings}
    return DissectTrainer(
        model=model,
        processing_class=processor,
        reference_model=reference,
        train_dataset=tiny_models.tiny_pairs(16),
        data_collator=collator and collator(processor),
        args=DissectTrainingArguments(str(tmp_path), **args),
    )


class OwnCollator:
    """A collator that wraps the one of the package, and does not know of sizes."""

    def __init__(self, processor):
        self.inner = SelectionCollator(processor)

    def __call__(self, rows):
        return self.inner(rows)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(model=tiny_models.tiny_align, patch_dropout=0.5), "patch_dropout=0.5 needs.*AlignVisionModel"),
        (dict(model=tiny_models.tiny_align, image_size=16), "image_size=16 needs a plain ViT.*AlignVisionModel"),
        (dict(model=tiny_models.tiny_siglip2, patch_dropout=0.5), "aspect ratio.*siglip2-base-patch16-224"),
        (dict(model=tiny_models.tiny_siglip2, image_size=16), "aspect ratio"),
        (dict(model=tiny_models.tiny_siglip2, scoring_image_size=16), "scoring_image_size=16.*aspect ratio"),
        (dict(patch_dropout=0.1), "drops none of the 4 patches of a picture; set it to at least 0.126"),
        (dict(patch_dropout=0.5, frozen=True), "frozen vision tower"),
        (dict(patch_dropout=1.0), "patch_dropout"),
        (dict(image_size=20), "image_size=20 does not fit.*32 pixels in patches of 16; allowed: 16, 32"),
        (dict(image_size=64), "allowed: 16, 32"),
        (dict(scoring_image_size=32), "scoring_image_size=32.*allowed: 16"),
        (dict(image_size={0: 32, 0.5: 16}), "last stage must have the model's own size, 32"),
        (dict(image_size={0.5: 32}), "the first share is 0"),
        (dict(image_size={0: 16, 1: 32}), r"the share is in \[0, 1\)"),
        (dict(image_size="large"), "'large' is not allowed"),
        (dict(image_size=True), "True is not allowed"),
        (dict(image_size=16, collator=OwnCollator), "OwnCollator does not prepare pictures of several sizes"),
        (dict(image_size={0: 16, 0.5: 32}, ignore_data_skip=True), "ignore_data_skip"),
        (dict(image_size=16, accelerator_config={"dispatch_batches": True}), "dispatch_batches"),
        (dict(scoring_exposure=0.5), "scoring_image_size is null"),
        (dict(scoring_image_size=16, selection_rescore_every=4), "rescore_every 4"),
        (dict(scoring_patch_dropout=0.5, selection_reference="a/b", selection_strategy="rho"), "reference 'a/b'"),
        (dict(image_size=16, reference_model=True, selection_strategy="rho"), "image_size=16.*a reference model"),
        (dict(scoring_image_size=16, reference_model=True, selection_strategy="rho"), "a reference model"),
    ],
)
def test_what_cannot_be_right_is_refused(settings, message, tmp_path):
    settings = dict(settings)
    model_of, collator = settings.pop("model", tiny_models.tiny_clip), settings.pop("collator", None)
    with pytest.raises(ValueError, match=message):
        make(model_of, tmp_path, collator, **settings)
