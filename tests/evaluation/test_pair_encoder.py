"""Evaluation and scoring with each image and each caption embedded once, against passes over all pairs."""

import random

import datasets
import pytest
import torch
from testing import tiny_models

from hf_dissect import DissectTrainer, DissectTrainingArguments, TwinDualEncoder
from hf_dissect.data.model_inputs import forward_inputs
from hf_dissect.evaluation.pair_encoder import PairEncoder
from hf_dissect.mola import register_router


class EachPair(PairEncoder):
    """The encoder that embeds image and caption of every pair, however often they occur."""

    def __call__(self, model, batch, **inputs):
        return model(**(inputs or forward_inputs(model, batch)))


class Counter:
    """Counts the rows that a tower embeds."""

    def __init__(self, model: torch.nn.Module, tower: str) -> None:
        self.rows, self.calls = 0, 0
        getattr(model, tower).register_forward_hook(self._count, with_kwargs=True)

    def _count(self, module, args, kwargs, output) -> None:
        self.rows += len(next(value for value in (*args, *kwargs.values()) if torch.is_tensor(value)))
        self.calls += 1


PROBE = 5  # two pairs, one of two images with one caption, one image with two captions: at most five rows a tower


def flat_pairs(num_images: int, captions_per_image: int, order: str = "grouped") -> datasets.Dataset:
    """A row for each caption, with the picture in all rows of its image."""
    rows = [
        {"image": row["image"], "caption": caption}
        for row in tiny_models.tiny_pairs(num_images, captions_per_image=captions_per_image)
        for caption in row["captions"]
    ]
    if order == "shuffled":
        random.Random(0).shuffle(rows)
    return datasets.Dataset.from_list(rows)


def make_trainer(folder, model, processor, data, batch_size=8, **settings) -> DissectTrainer:
    arguments = DissectTrainingArguments(
        str(folder),
        per_device_eval_batch_size=batch_size,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )
    return DissectTrainer(model=model, args=arguments, eval_dataset=data, processing_class=processor)


def compare_with_all_pairs(trainer: DissectTrainer) -> dict[str, float]:
    """Check that evaluation and scores are those of passes over all pairs, and return the figures."""
    figures, scores = trainer.evaluate(), trainer.score_pairs(trainer.eval_dataset)["correlation"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_dissect.evaluation.pair_scores.PairEncoder", EachPair)
        patch.setattr(trainer, "encoder", EachPair())
        expected, all_scores = trainer.evaluate(), trainer.score_pairs(trainer.eval_dataset)["correlation"]
    measured = {key for key in expected if not key.endswith(("_runtime", "_per_second", "_time"))}
    assert {key: figures[key] for key in measured} == pytest.approx({key: expected[key] for key in measured}, abs=1e-5)
    torch.testing.assert_close(scores, all_scores, rtol=0, atol=1e-4)  # correlations reach 100
    return figures


@pytest.mark.parametrize("batch_size", [3, 8, 64])
@pytest.mark.parametrize("order", ["lists", "grouped", "shuffled"])
def test_five_captions_an_image_cost_one_image_pass(order, batch_size, tmp_path):
    model, processor = tiny_models.tiny_clip()
    data = tiny_models.tiny_pairs(12, captions_per_image=5) if order == "lists" else flat_pairs(12, 5, order)
    trainer = make_trainer(tmp_path, model, processor, data, batch_size)
    images, texts = Counter(model, "vision_model"), Counter(model, "text_model")
    trainer.evaluate()
    distinct = len({caption for rows in trainer.eval_dataset for caption in [rows["caption"]]})
    # A batch without a new image or caption needs one that is known.
    assert 12 <= images.rows <= 12 + PROBE + max(images.calls - 3, 0)
    assert distinct <= texts.rows <= distinct + PROBE + max(texts.calls - 3, 0)
    assert images.rows < 60 and texts.calls == images.calls
    compare_with_all_pairs(trainer)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_all_families_give_the_figures_of_all_pairs(family, tmp_path):
    model, processor = getattr(tiny_models, family)()
    data = flat_pairs(10, 4, "shuffled")
    trainer = make_trainer(tmp_path, model, processor, data)
    images = Counter(model, "vision_model")
    compare_with_all_pairs(trainer)
    assert images.rows < 3 * 40, "two passes over the distinct images, two over the pairs"


@pytest.mark.parametrize("masks", [False, True])
def test_unreadable_pairs_do_not_lend_their_placeholder(masks, tmp_path):
    model, processor = tiny_models.tiny_clip()
    rows = flat_pairs(6, 4).to_list()
    rows[0]["caption"], rows[9]["caption"] = None, "  "  # whose images other pairs have as well
    rows[4]["image"] = rows[13]["image"] = {"bytes": b"damaged", "path": None}
    data = datasets.Dataset.from_list(rows)
    trainer = make_trainer(tmp_path, model, processor, data, 5, mask_false_negatives=masks)
    compare_with_all_pairs(trainer)
    assert len(trainer.score_pairs(data)["correlation"]) == 20


def test_two_networks_and_mixed_precision(tmp_path):
    model, processor = tiny_models.tiny_clip()
    twins = TwinDualEncoder.of(model, tiny_models.tiny_clip(seed=1)[0])
    compare_with_all_pairs(make_trainer(tmp_path / "twins", twins, processor, flat_pairs(8, 3, "shuffled")))
    trainer = make_trainer(tmp_path / "bf16", model, processor, flat_pairs(8, 3, "shuffled"), bf16=True)
    images = Counter(model, "vision_model")
    figures = trainer.evaluate()
    assert images.rows < 8 + PROBE + images.calls
    trainer.encoder = EachPair()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(figures["eval_loss"], abs=2e-3)


class ReadsCaptions(torch.nn.Module):
    """A router that scores the experts of both towers by the caption."""

    def __init__(self, config, model) -> None:
        super().__init__()
        self.scores = torch.nn.Embedding(1000, config.num_experts)

    def forward(self, input_ids, **inputs):
        return self.scores(input_ids).mean(1) * 50


def set_experts(model: torch.nn.Module) -> torch.nn.Module:
    """Let the experts differ, which start alike."""
    torch.manual_seed(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "mola_B" in name:
                weight.normal_(std=0.5)
    return model


@pytest.mark.parametrize("router", ["pixels", "embeddings", "caption"])
def test_routers_see_what_they_see_with_all_pairs(router, tmp_path):
    register_router("caption", ReadsCaptions)
    model, processor = tiny_models.tiny_clip()
    model = set_experts(tiny_models.with_mola(model, "router", router_input=router))
    images = Counter(model.get_base_model(), "vision_model")
    trainer = make_trainer(tmp_path, model, processor, flat_pairs(8, 3, "shuffled"))
    trainer.evaluate()
    assert (images.rows < 24) == (router != "caption")
    compare_with_all_pairs(trainer)


def test_experts_of_tasks_serve_each_pair_by_its_own_task(tmp_path):
    model, processor = tiny_models.tiny_clip()
    model = set_experts(tiny_models.with_mola(model, "grad"))
    data = flat_pairs(8, 3)
    data = data.add_column("style", [index % 2 for index in range(24)])  # an image has pairs of both tasks
    figures = compare_with_all_pairs(make_trainer(tmp_path, model, processor, data, task_column="style"))
    other = make_trainer(
        tmp_path, model, processor, data.map(lambda row: {"style": 1 - row["style"]}), task_column="style"
    )
    assert other.evaluate()["eval_loss"] != pytest.approx(figures["eval_loss"], abs=1e-4)


class CentredEncoder(type(tiny_models.tiny_clip()[0])):
    """A model whose embeddings depend on the other pairs of the batch."""

    def forward(self, **inputs):
        outputs = super().forward(**inputs)
        outputs.image_embeds = outputs.image_embeds - outputs.text_embeds.mean(0)
        outputs.logits_per_text = outputs.text_embeds @ outputs.image_embeds.T
        return outputs


class FixedSizeEncoder(type(tiny_models.tiny_clip()[0])):
    """A model that reads as many images as captions."""

    def forward(self, pixel_values, input_ids, **inputs):
        if len(pixel_values) != len(input_ids):
            raise ValueError("one image for each caption")
        return super().forward(pixel_values=pixel_values, input_ids=input_ids, **inputs)


@pytest.mark.parametrize("kind", [CentredEncoder, FixedSizeEncoder])
def test_a_model_that_must_see_the_pairs_sees_them(kind, tmp_path):
    base, processor = tiny_models.tiny_clip()
    model = kind(base.config).eval()
    trainer = make_trainer(tmp_path, model, processor, flat_pairs(6, 3))
    compare_with_all_pairs(trainer)
    images = Counter(model, "vision_model")
    trainer.evaluate()
    assert images.rows >= 18


def test_pairs_that_share_nothing_are_embedded_as_they_are(tmp_path):
    model, processor = tiny_models.tiny_clip()
    trainer = make_trainer(tmp_path, model, processor, tiny_models.tiny_pairs(20))
    images = Counter(model, "vision_model")
    trainer.evaluate()
    assert (images.rows, images.calls) == (20, 3)


def test_nothing_is_remembered_when_the_weights_change(tmp_path):
    model, processor = tiny_models.tiny_clip()
    trainer = make_trainer(tmp_path, model, processor, flat_pairs(6, 3))
    before = trainer.evaluate()["eval_loss"]
    with torch.no_grad():
        model.visual_projection.weight.normal_()
    assert compare_with_all_pairs(trainer)["eval_loss"] != pytest.approx(before, abs=1e-3)
    batch = next(iter(trainer.get_eval_dataloader()))
    losses = []
    for _ in range(2):
        losses.append(float(trainer.prediction_step(model, batch, prediction_loss_only=True)[0]))
        with torch.no_grad():
            model.visual_projection.weight.normal_()
    assert losses[0] != pytest.approx(losses[1], abs=1e-3)


def test_a_full_memory_forgets_and_the_figures_stay(tmp_path, monkeypatch):
    model, processor = tiny_models.tiny_clip()
    trainer = make_trainer(tmp_path, model, processor, flat_pairs(10, 4, "shuffled"), batch_size=4)
    monkeypatch.setattr(trainer, "encoder", PairEncoder(max_remembered=3))
    compare_with_all_pairs(trainer)


def test_a_stream_and_batches_of_another_collator(tmp_path):
    model, processor = tiny_models.tiny_clip()
    trainer = make_trainer(tmp_path / "stream", model, processor, flat_pairs(6, 3).to_iterable_dataset())
    images = Counter(model, "vision_model")
    trainer.evaluate()
    assert images.rows < 6 + PROBE + images.calls
    compare_with_all_pairs(trainer)
    trainer = make_trainer(tmp_path / "own", model, processor, flat_pairs(6, 3))
    collator = trainer.data_collator
    trainer.data_collator = lambda rows: {
        name: value for name, value in collator(rows).items() if name not in ("image_key", "caption_key", "bad_reason")
    }
    images.rows = 0
    assert "eval_repeated_captions" not in trainer.evaluate()
    assert images.rows == 18
