"""The final model is the mean of the last weights, in all kinds of runs, and resumed runs end with the same mean."""

import json
import logging
import math
import os
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from peft import LoraConfig
from safetensors.torch import load_file
from testing import averaging_ranks
from testing.launched import on_ranks
from testing.tiny_modalities import tiny_arguments, tiny_columns, tiny_trainer
from testing.tiny_models import (
    tiny_align,
    tiny_clip,
    tiny_inputs,
    tiny_pairs,
    tiny_siglip,
    with_lora,
    with_mola,
)
from testing.tiny_recipe import tiny_recipe, tiny_settings
from transformers import TrainerCallback

from hf_dissect import DissectTrainer, DissectTrainingArguments, Recipe, TwinDualEncoder, load_model_and_processor
from hf_dissect.models.families import LARGEST_LOG_SCALE, freeze_tower
from hf_dissect.recipe.fields import RecipeError
from hf_dissect.runs.run import run_recipe
from hf_dissect.training.averaged_weights import AveragedWeights, find_start
from hf_dissect.training.interruption import StoppedBySignal
from hf_dissect.training.non_finite import NonFiniteLossError
from hf_dissect.training.run_state import TENSORS_FILE

SETTINGS = {
    "per_device_train_batch_size": 8,
    "max_steps": 8,
    "learning_rate": 1e-2,
    "selection_strategy": "random",
    "average_weights": 0.75,
    "logging_steps": 2,
    "save_strategy": "no",
    "save_run_folder": False,
    "check_reload": False,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}


class Recorder(TrainerCallback):
    """Keeps parameters and buffers as they are after each step."""

    def __init__(self):
        self.steps: dict[int, dict[str, torch.Tensor]] = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        values = [*model.named_parameters(), *model.named_buffers()]
        self.steps[state.global_step] = {name: value.detach().double().clone() for name, value in values}

    def mean_after(self, start: int) -> dict[str, torch.Tensor]:
        last = [values for step, values in self.steps.items() if step > start]
        return {name: sum(values[name] for values in last) / len(last) for name in last[0]}


class At(TrainerCallback):
    """Does something at the beginning or the end of one step."""

    def __init__(self, step: int, action, event: str = "on_step_end"):
        self.step, self.action = step, action
        setattr(self, event, self._act)

    def _act(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action(control)


def make_trainer(folder, model=None, processor=None, *, stream=False, recorder=None, **settings) -> DissectTrainer:
    tiny_model, tiny_processor = tiny_clip()
    pairs = tiny_pairs(64)
    trainer = DissectTrainer(
        model=tiny_model if model is None else model,
        processing_class=processor or tiny_processor,
        train_dataset=pairs.to_iterable_dataset(4) if stream else pairs,
        eval_dataset=tiny_pairs(16, seed=1),
        args=DissectTrainingArguments(str(folder), **{**SETTINGS, **settings}),
    )
    if recorder is not None:
        trainer.add_callback(recorder)
    return trainer


def weights_of(trainer) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name, value in one.items() if not torch.equal(value, other[name])] == []


def check_mean(trainer, recorder: Recorder, start: int) -> None:
    """Compare the model with the mean of the recorded weights, and what does not train with what it was."""
    mean, last = recorder.mean_after(start), recorder.steps[max(recorder.steps)]
    moved = 0
    for name, weight in trainer.model.named_parameters():
        if weight.requires_grad:
            torch.testing.assert_close(weight.detach().double(), mean[name], rtol=1e-6, atol=1e-6)
            moved += not torch.allclose(mean[name], last[name], atol=1e-5)
        else:
            assert torch.equal(weight.double(), last[name]), name
    assert moved > 0 or start == max(recorder.steps) - 1, "the last weights are another model"
    steps = max(recorder.steps) - start
    assert trainer.run_metrics({})["averaged_weights"] == {"steps": steps, "first_step": start + 1}


# ---- the mean ----


@pytest.mark.parametrize(
    ("share", "max_steps", "start"),
    [(0.75, 8, 2), (0.75, 10, 2), (0.75, 1, 0), (1.0, 7, 0), (1, 7, 0), (0.9, 10, 1), (0.07, 100, 93)]
    + [(0.3, 10, 7), (0.1, 3, 2), (1e-9, 50, 49), (0.5, 5, 2), (0.55, 100, 45), (2 / 3, 3, 1)],
)
def test_the_mean_begins_at_its_share_of_the_steps(share, max_steps, start):
    assert find_start(share, max_steps) == start


def freeze_vision(model):
    freeze_tower(model, "vision")
    return model


def tie(model):
    model.visual_projection.weight = model.text_projection.weight
    return model


def inject(model):
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    return model


def at_the_largest_scale(model):
    model.logit_scale.data.fill_(LARGEST_LOG_SCALE)
    return model


CASES = {
    "epochs, two micro-batches": (None, dict(max_steps=-1, num_train_epochs=3, gradient_accumulation_steps=2), 3),
    "stream, all steps": (None, dict(stream=True, average_weights=1.0, max_steps=5), 0),
    "a single step": (None, dict(average_weights=0.3, max_steps=3, selection_strategy="none"), 2),
    "bf16 and chunks": (None, dict(bf16=True, grad_cache_chunk_size=3, selection_strategy="none"), 2),
    "gradient checkpointing": (None, dict(gradient_checkpointing=True, selection_strategy="small_loss"), 2),
    "frozen tower": (freeze_vision, {}, 2),
    "lora": (with_lora, {}, 2),
    "injected lora": (inject, {}, 2),
    "mola": (partial(with_mola, train_base="all", init_weights=False), {}, 2),
    "tied weights": (tie, {}, 2),
    "largest logit scale": (at_the_largest_scale, {}, 2),
    "twins": (lambda model: TwinDualEncoder.of(model, tiny_clip(seed=1)[0]), dict(gsc={"dual": True}), 2),
    "compiled": (None, dict(torch_compile=True, torch_compile_backend="eager", max_steps=3), 0),
}


@pytest.mark.parametrize("case", CASES)
def test_the_final_model_is_the_mean_of_the_last_weights(case, tmp_path):
    change, settings, start = CASES[case]
    if settings.get("gsc"):
        settings = {**settings, "selection_strategy": "none", "max_steps": -1, "num_train_epochs": 2}
        settings["per_device_train_batch_size"], start = 16, 2
    model, recorder = tiny_clip()[0], Recorder()
    model = model if change is None else change(model)
    trainer = make_trainer(tmp_path, model, recorder=recorder, **settings)
    trainer.train()
    check_mean(trainer, recorder, start)
    if hasattr(trainer.model, "logit_scale"):
        assert 0 <= trainer.model.logit_scale <= LARGEST_LOG_SCALE
    if case == "tied weights":
        assert trainer.model.visual_projection.weight is trainer.model.text_projection.weight


def test_other_losses_and_a_second_training(tmp_path):
    recorder = Recorder()
    trainer = make_trainer(tmp_path, *tiny_siglip(), recorder=recorder, max_steps=4)
    trainer.train()
    check_mean(trainer, recorder, 1)
    recorder.steps.clear()
    trainer.train()  # from the mean on, with a mean of its own
    check_mean(trainer, recorder, 1)


def test_weights_of_half_precision_are_averaged_in_single_precision(tmp_path):
    recorder = Recorder()
    trainer = make_trainer(tmp_path, tiny_clip()[0].to(torch.bfloat16), recorder=recorder, learning_rate=1e-3)
    trainer.train()
    mean = recorder.mean_after(2)
    for name, weight in trainer.model.named_parameters():
        assert weight.dtype == torch.bfloat16
        torch.testing.assert_close(weight.double(), mean[name].bfloat16().double(), rtol=2**-7, atol=0)
    exact = [torch.equal(weight, mean[name].bfloat16()) for name, weight in trainer.model.named_parameters()]
    assert sum(exact) > 0.9 * len(exact), "rounded once, at the end"


def test_a_weight_that_is_released_or_frozen_on_the_way_counts_with_its_value_of_each_step(tmp_path):
    model, recorder = tiny_clip()[0], Recorder()
    model.visual_projection.requires_grad_(False)
    trainer = make_trainer(tmp_path, model, recorder=recorder, weight_decay=0.0)
    trainer.create_optimizer()
    trainer.optimizer.add_param_group({"params": list(model.visual_projection.parameters())})
    trainer.add_callback(At(4, lambda control: model.visual_projection.requires_grad_(True), "on_step_begin"))
    trainer.add_callback(At(6, lambda control: model.text_projection.requires_grad_(False), "on_step_begin"))
    trainer.train()
    for weight in (model.text_projection.weight, model.visual_projection.weight):
        weight.requires_grad_(True)
    check_mean(trainer, recorder, 2)
    projections = [values["visual_projection.weight"] for values in recorder.steps.values()]
    assert torch.equal(projections[2], projections[3]) and not torch.equal(projections[3], projections[4])


@pytest.mark.parametrize("frozen", [False, True])
def test_statistics_of_batch_norm_are_averaged_where_they_train_and_counters_are_the_last(frozen, tmp_path):
    model, processor = tiny_align()
    norm = next(module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d))
    norm.requires_grad_(not frozen)
    before, recorder = norm.running_mean.clone(), Recorder()
    trainer = make_trainer(tmp_path, model, processor, recorder=recorder, max_steps=4)
    trainer.train()
    check_mean(trainer, recorder, 1)
    mean, last, averaged = recorder.mean_after(1), recorder.steps[4], 0
    for name, value in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            torch.testing.assert_close(value.double(), mean[name], rtol=1e-5, atol=1e-6)
            averaged += not torch.equal(value.double(), last[name])
        else:
            assert torch.equal(value.double(), last[name]), name
    assert averaged > 2 and torch.equal(norm.running_mean, before) == frozen


def test_vectors_of_a_spectral_norm_stay_the_last(tmp_path):
    model, recorder = tiny_clip()[0], Recorder()
    torch.nn.utils.parametrizations.spectral_norm(model.visual_projection)
    trainer = make_trainer(tmp_path, model, recorder=recorder)
    trainer.train()
    check_mean(trainer, recorder, 2)
    assert torch.equal(
        model.visual_projection.parametrizations.weight[0]._u.double(),
        recorder.steps[8]["visual_projection.parametrizations.weight.0._u"],
    )


# ---- in training nothing changes ----


def test_training_and_its_evaluations_are_those_of_a_run_without(tmp_path):
    settings = dict(eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=4)
    runs = {}
    for share in (None, 0.75):
        trainer = make_trainer(tmp_path / str(share), average_weights=share, **settings)
        trainer.train()
        logs = [
            {k: v for k, v in log.items() if "time" not in k and "per_second" not in k}
            for log in trainer.state.log_history
            if "train_loss" not in log
        ]
        runs[share] = logs, trainer.evaluate()["eval_loss"], trainer.run_metrics({})
    assert runs[None][0] == runs[0.75][0] and any("eval_loss" in log for log in runs[0.75][0])
    last_loss = [log["eval_loss"] for log in runs[0.75][0] if "eval_loss" in log][-1]
    assert runs[None][1] == last_loss and runs[0.75][1] != last_loss
    assert "averaged_weights" not in runs[None][2]
    for step in (4, 8):
        one, other = (load_file(tmp_path / str(share) / f"checkpoint-{step}" / "model.safetensors") for share in runs)
        assert_equal(one, other)


# ---- resuming ----


def train_whole(folder, **settings) -> tuple[dict[str, torch.Tensor], dict]:
    trainer = make_trainer(folder, **settings)
    trainer.train()
    return weights_of(trainer), trainer.run_metrics({})["averaged_weights"]


@pytest.mark.parametrize(
    ("stop", "settings"),
    [
        (2, {}),  # before the mean, which begins with step 5
        (4, {}),  # at its beginning
        (5, dict(gradient_accumulation_steps=2)),
        (7, dict(stream=True)),
        (7, dict(model=with_lora)),
        (7, dict(model="align")),
    ],
)
def test_a_resumed_run_ends_with_the_same_mean(stop, settings, tmp_path):
    settings = {"average_weights": 0.5, **settings}
    change = settings.pop("model", None)

    def build(folder, **more):
        model, processor = tiny_align() if change == "align" else tiny_clip()
        return make_trainer(folder, change(model) if callable(change) else model, processor, **settings, **more)

    whole = build(tmp_path / "whole")
    whole.train()
    trainer = build(tmp_path / "run", save_strategy="steps", save_steps=stop)
    trainer.add_callback(At(stop + 1, interrupt))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    saved = load_file(tmp_path / "run" / f"checkpoint-{stop}" / TENSORS_FILE)
    means = {name for name in saved if name.startswith("parts/averaged_weights")}
    trained = {name for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    statistics = {name for name, _ in trainer.model.named_buffers() if "running_" in name}
    found = {name.removeprefix("parts/averaged_weights/means/") for name in means}
    assert found == (trained | statistics if stop > 4 else set())
    trainer = build(tmp_path / "run")
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 8
    assert_equal(whole.model.state_dict(), trainer.model.state_dict())
    assert trainer.run_metrics({})["averaged_weights"] == {"steps": 4, "first_step": 5}


def interrupt(control) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("stop", [1, 5, "end"])
def test_sigterm_saves_the_weights_in_training_and_their_mean(stop, tmp_path):
    whole, described = train_whole(tmp_path / "whole")
    recorder = Recorder()
    trainer = make_trainer(tmp_path / "run", recorder=recorder)
    stop_self = lambda control=None: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
    callback = At(8, stop_self, "on_train_end") if stop == "end" else At(stop, stop_self)
    trainer.add_callback(callback)
    with pytest.raises(StoppedBySignal) as stopped:
        trainer.train()
    step = trainer.state.global_step
    saved = load_file(Path(stopped.value.checkpoint) / "model.safetensors")
    for name, value in saved.items():
        assert torch.equal(value.double(), recorder.steps[step][name])
    trainer = make_trainer(tmp_path / "run")
    trainer.train(resume_from_checkpoint=True)
    assert_equal(weights_of(trainer), whole)
    assert trainer.run_metrics({})["averaged_weights"] == described


def test_a_finished_run_that_is_resumed_ends_with_the_mean_again(tmp_path):
    whole, described = train_whole(tmp_path, save_strategy="steps", save_steps=8)
    trainer = make_trainer(tmp_path)
    trainer.train(resume_from_checkpoint=True)
    assert_equal(weights_of(trainer), whole)
    assert trainer.run_metrics({})["averaged_weights"] == described


def test_a_checkpoint_without_the_mean_is_refused_with_the_ways_out(tmp_path):
    make_trainer(tmp_path, average_weights=None, save_strategy="steps", save_steps=2).train()
    checkpoint = str(tmp_path / "checkpoint-4")
    steps: list[int] = []
    trainer = make_trainer(tmp_path)
    trainer.add_callback(At(5, lambda control: steps.append(5)))
    expected = r"average_weights=0.75 .*training.average_weights.* from step 3 on.*checkpoint-4, of step 4, holds no "
    with pytest.raises(ValueError, match=expected + r"mean of them.*before step 3, or without .*at most 0\.5\."):
        trainer.train(resume_from_checkpoint=checkpoint)
    assert not steps
    with pytest.raises(ValueError, match=r"holds no mean of them.*or without average_weights\.$"):
        make_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    for share, name in ((0.75, "checkpoint-2"), (0.5, "checkpoint-4")):
        recorder = Recorder()
        trainer = make_trainer(tmp_path, average_weights=share, recorder=recorder)
        trainer.train(resume_from_checkpoint=str(tmp_path / name))
        check_mean(trainer, recorder, 8 - round(8 * share))


def test_a_checkpoint_with_the_mean_of_other_steps(tmp_path):
    train_whole(tmp_path, average_weights=0.5, save_strategy="steps", save_steps=2)
    checkpoint = str(tmp_path / "checkpoint-6")
    with pytest.raises(ValueError, match=r"average_weights=0.75 .*checkpoint-6, of step 6, holds .*from step 5 on"):
        make_trainer(tmp_path, average_weights=0.75).train(resume_from_checkpoint=checkpoint)
    # The mean may begin later, and a run without one discards that of the checkpoint.
    recorder = Recorder()
    trainer = make_trainer(tmp_path, average_weights=0.25, recorder=recorder)
    trainer.train(resume_from_checkpoint=checkpoint)
    check_mean(trainer, recorder, 6)
    trainer = make_trainer(tmp_path, average_weights=None)
    trainer.train(resume_from_checkpoint=checkpoint)
    assert_equal(weights_of(trainer), dict(load_file(tmp_path / "checkpoint-8" / "model.safetensors").items()))
    assert "averaged_weights" not in trainer.run_metrics({})
    # A longer run averages the same share of more steps: those of the checkpoint come before its mean.
    recorder = Recorder()
    trainer = make_trainer(tmp_path, average_weights=0.5, max_steps=12, recorder=recorder)
    trainer.train(resume_from_checkpoint=checkpoint)
    check_mean(trainer, recorder, 6)
    with pytest.raises(ValueError, match="from step 6 on.*holds their mean from step 5 on"):
        make_trainer(tmp_path, average_weights=0.5, max_steps=10).train(resume_from_checkpoint=checkpoint)


def test_the_mean_continues_with_another_number_of_candidates_a_step(tmp_path):
    settings = dict(max_steps=-1, num_train_epochs=2, average_weights=0.75)  # 16 steps, or 8 of twice as many
    train_whole(tmp_path, save_strategy="steps", save_steps=8, **settings)
    saved = load_file(tmp_path / "checkpoint-8" / TENSORS_FILE)
    recorder = Recorder()
    trainer = make_trainer(tmp_path, per_device_train_batch_size=16, recorder=recorder, **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert list(recorder.steps) == [5, 6, 7, 8]
    name = "visual_projection.weight"
    before = saved[f"parts/averaged_weights/means/{name}"].double()  # of 4 steps, worth 2 of these
    mean = (2 * before + sum(values[name] for values in recorder.steps.values())) / 6
    torch.testing.assert_close(trainer.model.visual_projection.weight.double(), mean, rtol=1e-6, atol=1e-6)
    assert trainer.run_metrics({})["averaged_weights"] == {"steps": 6, "first_step": 3}


# ---- the end ----


def test_a_run_that_ends_early(tmp_path, caplog):
    def end(control):
        control.should_training_stop = True

    recorder = Recorder()
    trainer = make_trainer(tmp_path, recorder=recorder)
    trainer.add_callback(At(5, end))
    trainer.train()
    check_mean(trainer, recorder, 2)
    recorder = Recorder()
    trainer = make_trainer(tmp_path, recorder=recorder)
    trainer.add_callback(At(2, end))
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "averages from step 3 on, and training ended after step 2: the model has the last weights" in caplog.text
    assert "averaged_weights" not in trainer.run_metrics({})
    for name, weight in trainer.model.named_parameters():
        assert torch.equal(weight.double(), recorder.steps[2][name])


def test_a_mean_that_is_not_finite_is_not_saved(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=2)
    weight = trainer.model.visual_projection.weight
    kept: list[torch.Tensor] = []

    def spoil(control):
        kept.append(weight.detach().clone())
        weight.data[0, 0] = math.inf

    # Before the mean takes the weights of step 3, and back before the next step.
    trainer.callback_handler.callbacks.insert(0, At(3, spoil))
    trainer.add_callback(At(3, lambda control: weight.data.copy_(kept[0])))
    with pytest.raises(NonFiniteLossError, match=r"step 4 the mean of 1 weights .*visual_projection.*since step 3"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def embed(model, processor) -> torch.Tensor:
    inputs = tiny_inputs(model, processor, ["red left", "a blue patch", "top", "grey"])
    with torch.no_grad():
        outputs = model.eval()(**inputs)
    return torch.cat([outputs.image_embeds, outputs.text_embeds])


@pytest.mark.parametrize("change", [None, with_lora, partial(with_mola, train_base="all", init_weights=False)])
def test_the_run_folder_holds_the_mean_and_says_so(change, tmp_path):
    model, processor = tiny_clip()
    recorder = Recorder()
    model = model if change is None else change(model)
    settings = dict(save_run_folder=True, eval_strategy="epoch", save_strategy="epoch")
    trainer = make_trainer(tmp_path, model, processor, recorder=recorder, **settings)
    trainer.train()
    check_mean(trainer, recorder, 2)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["averaged_weights"] == {"steps": 6, "first_step": 3}
    assert metrics["settings"]["average_weights"] == 0.75
    card, report = (tmp_path / name for name in ("README.md", "report.html"))
    assert "| Final weights | mean of 6 steps, from step 3 on |" in card.read_text()
    assert "izmailov2018swa" in card.read_text()
    assert "<dt>Final weights</dt><dd>mean of 6 steps, from step 3 on</dd>" in report.read_text()
    reloaded, _ = load_model_and_processor(name_or_path=str(tmp_path))
    assert torch.equal(embed(reloaded, processor), embed(trainer.model, processor))
    assert metrics["final"]["loss"] == pytest.approx(trainer.evaluate()["eval_loss"], abs=1e-6)
    last, _ = load_model_and_processor(name_or_path=str(tmp_path / "checkpoint-8"))
    assert not torch.allclose(embed(last, processor), embed(trainer.model, processor), atol=1e-4)


def test_a_recipe_averages_and_is_saved_with_the_setting(tmp_path):
    recipe = tiny_recipe(tmp_path / "run", training={"average_weights": 0.5})
    metrics = run_recipe(recipe)
    assert metrics["averaged_weights"] == {"steps": 4, "first_step": 5}
    assert Recipe.load(tmp_path / "run" / "recipe.yaml").training["average_weights"] == 0.5


def test_a_distillation_averages_all_its_networks(tmp_path):
    recorder = Recorder()
    trainer = tiny_trainer(
        tmp_path / "run", evaluation=tiny_columns(8, seed=1), average_weights=0.5, save_run_folder=True
    )
    trainer.add_callback(recorder)
    trainer.train()
    check_mean(trainer, recorder, 3)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["averaged_weights"] == {"steps": 3, "first_step": 4}
    assert metrics["settings"]["average_weights"] == 0.5
    assert "mean of 3 steps, from step 4 on" in (tmp_path / "run" / "README.md").read_text()
    assert "mean of 3 steps, from step 4 on" in (tmp_path / "run" / "report.html").read_text()
    saved = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(value, trainer.student.state_dict()[name]) for name, value in saved.items())
    settings = dict(average_weights=0.5, save_strategy="steps", save_steps=4)
    tiny_trainer(tmp_path / "saved", **settings).train()
    resumed = tiny_trainer(tmp_path / "saved", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "saved" / "checkpoint-4"))
    assert_equal(weights_of(resumed), weights_of(trainer))


# ---- settings that are refused ----


@pytest.mark.parametrize("share", [0, 0.0, -0.5, 1.01, 75, float("nan"), float("inf"), "0.75", "half", True, [0.5]])
def test_a_share_outside_of_its_range_is_refused(share, tmp_path):
    expected = r"average_weights=.* is not allowed; allowed: a number( or null, | )in \(0, 1\]"
    with pytest.raises(ValueError, match=expected):
        DissectTrainingArguments(str(tmp_path), average_weights=share)
    with pytest.raises(ValueError, match=expected):
        tiny_arguments(tmp_path, average_weights=share)
    with pytest.raises(RecipeError, match=r"training\.average_weights: .* is not allowed; allowed: a "):
        Recipe.from_dict(tiny_settings(training={"average_weights": share}))


def test_what_contradicts_a_mean_is_refused(tmp_path):
    settings = dict(load_best_model_at_end=True, eval_strategy="steps", save_strategy="steps")
    with pytest.raises(ValueError, match=r"average_weights=0.75 .*load_best_model_at_end.*average_weights to None"):
        DissectTrainingArguments(str(tmp_path), average_weights=0.75, **settings)
    with pytest.raises(RecipeError, match=r"training\.average_weights: 0\.75 .*load_best_model_at_end to false"):
        Recipe.from_dict(tiny_settings(training={"average_weights": 0.75, **settings}))
    with pytest.raises(ValueError, match=r"average_weights=0.75 .*optim='schedule_free_adamw'.*averages the weights"):
        DissectTrainingArguments(str(tmp_path), average_weights=0.75, optim="schedule_free_adamw")
    with pytest.raises(RecipeError, match=r"training\.average_weight: unknown key.*did you mean 'average_weights'"):
        Recipe.from_dict(tiny_settings(training={"average_weight": 0.75}))
    args = DissectTrainingArguments(str(tmp_path), average_weights=0.75, use_cpu=True)
    for kind, name in ((DistributedType.DEEPSPEED, "DeepSpeed"), (DistributedType.FSDP, "FSDP of version 1")):
        with pytest.raises(ValueError, match=f"average_weights=0.75 cannot be used with {name}.*use DDP or FSDP2"):
            AveragedWeights(args, SimpleNamespace(distributed_type=kind, is_fsdp2=False))

    class MovesWeights(torch.optim.SGD):
        def eval(self) -> None:
            """Move the weights, as schedule-free optimisers do."""

    model, processor = tiny_clip()
    with pytest.raises(ValueError, match="average_weights=0.75 cannot be used with MovesWeights"):
        DissectTrainer(
            model=model,
            processing_class=processor,
            train_dataset=tiny_pairs(16),
            args=args,
            optimizers=(MovesWeights(model.parameters()), None),
        )


# ---- several processes ----


@pytest.mark.slow
def test_two_processes_average_alike_and_resume(tmp_path):
    """Train five times in two processes."""
    results = on_ranks([2], tmp_path, partial(averaging_ranks.train_and_resume, tmp_path))[2]
    torch.testing.assert_close(results["weights"], results["mean"], rtol=1e-6, atol=1e-6)
    # One process continues from the checkpoint of two.
    trainer = averaging_ranks.make_trainer(tmp_path / "two", batch_size=16)
    trainer.train(resume_from_checkpoint=str(tmp_path / "two" / "checkpoint-6"))
    assert trainer.run_metrics({})["averaged_weights"] == {"steps": 6, "first_step": 3}
