"""The figures of a trained model are written as they come: neither a fault nor SIGTERM loses those that are ready."""

import json
import os
import signal

import numpy as np
import pytest
from safetensors.torch import load_file
from testing import tiny_models
from transformers import AutoModel, TrainerCallback

from hf_dissect import DissectTrainer, DissectTrainingArguments
from hf_dissect.training.interruption import StoppedAfterTraining, StopRequest

FIGURES = {"zero_shot_accuracy@1": 0.5}


class AtPrediction(TrainerCallback):
    """Send SIGTERM at a prediction of an evaluation."""

    def on_prediction_step(self, args, state, control, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)


def make_trainer(folder, num_pairs=48, **settings) -> DissectTrainer:
    model, processor = tiny_models.tiny_clip()
    args = dict(per_device_train_batch_size=16, max_steps=2, num_train_epochs=1, report_to="none", use_cpu=True)
    args |= dict(disable_tqdm=True, save_strategy="no", save_run_folder=False, selection_strategy="clipscore")
    return DissectTrainer(
        model,
        DissectTrainingArguments(str(folder), **args | settings),
        train_dataset=tiny_models.tiny_pairs(num_pairs, noisy=num_pairs // 4),
        eval_dataset=tiny_models.tiny_pairs(8, seed=1),
        processing_class=processor,
    )


def read_metrics(folder) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def terminate() -> dict:
    os.kill(os.getpid(), signal.SIGTERM)
    return FIGURES


def fail() -> dict:
    raise ValueError("the labels are wrong")


def test_each_part_is_written_when_it_is_ready(tmp_path):
    trainer, seen = make_trainer(tmp_path), []

    def note() -> dict:
        seen.append(read_metrics(tmp_path))
        return FIGURES

    trainer.train()
    metrics = trainer.finish(more_figures=note)
    assert seen[0]["unfinished"] is True and seen[0]["final"]["recall_sum"] == metrics["final"]["recall_sum"]
    assert "zero_shot_accuracy@1" not in seen[0]["final"] and (tmp_path / "model.safetensors").is_file()
    assert metrics == read_metrics(tmp_path) and "unfinished" not in metrics
    assert list(metrics["final"])[-1].startswith("noise_detection") and FIGURES.items() <= metrics["final"].items()


def test_a_fault_in_one_figure_keeps_the_others_and_the_model(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    with pytest.raises(ValueError, match="the labels are wrong"):
        trainer.finish(more_figures=fail)
    metrics = read_metrics(tmp_path)
    assert metrics["unfinished"] is True and 0 < metrics["final"]["recall_sum"] <= 600
    assert AutoModel.from_pretrained(tmp_path).config.model_type == "clip"


def test_sigterm_in_a_later_figure_keeps_the_earlier_ones(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    with pytest.raises(StoppedAfterTraining, match="hf-dissect evaluate") as stop:
        trainer.finish(more_figures=terminate)
    metrics = read_metrics(tmp_path)
    assert stop.value.code == 143 and str(tmp_path) in str(stop.value)
    assert metrics["unfinished"] is True and "recall_sum" in metrics["final"]
    assert "zero_shot_accuracy@1" not in metrics["final"] and "noise_detection_auroc" not in metrics["final"]
    assert load_file(tmp_path / "model.safetensors") and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_sigterm_in_the_middle_of_a_pass_ends_it(tmp_path):
    trainer = make_trainer(tmp_path, save_run_folder=True)
    trainer.add_callback(AtPrediction())
    with pytest.raises(StoppedAfterTraining):
        trainer.train()  # which finishes the run folder, too
    assert read_metrics(tmp_path)["final"] == {} and (tmp_path / "model.safetensors").is_file()
    assert not (tmp_path / "report.html").exists()


def test_sigterm_between_training_and_figures_is_heard_after_the_model_is_saved(tmp_path):
    trainer = make_trainer(tmp_path)
    with pytest.raises(StoppedAfterTraining), trainer.stop_request.listen():
        trainer.train()
        os.kill(os.getpid(), signal.SIGTERM)
        trainer.finish()
    assert (tmp_path / "model.safetensors").is_file() and read_metrics(tmp_path)["unfinished"] is True


def test_a_block_that_holds_is_ended_before_sigterm_is_answered():
    request, done = StopRequest(), []
    with pytest.raises(StoppedAfterTraining):
        with request.listen(), request.interrupt(lambda: StoppedAfterTraining("run"), asked=False):
            with request.hold():
                os.kill(os.getpid(), signal.SIGTERM)
                done.append("whole")
            done.append("later")
    assert done == ["whole"]


def test_large_training_data_are_scored_in_part(tmp_path):
    def figures(folder, **settings) -> tuple[DissectTrainer, dict]:
        trainer = make_trainer(folder, num_pairs=64, **settings)
        trainer.train()
        return trainer, trainer.finish()

    trainer, sampled = figures(tmp_path / "sampled", max_train_pairs=40)
    final, shown = sampled["final"], (tmp_path / "sampled" / "report.html").read_text()
    assert final["noise_detection_num_scored"] == sampled["scored_train_pairs"] == 40
    assert "random sample of the training pairs" in shown and "40 of 64" in shown
    assert "a random sample of 40 training pairs" in (tmp_path / "sampled" / "README.md").read_text()
    # AUROC of those very pairs: share of (matched, mismatched) couples whose scores are in order.
    chosen = np.sort(np.random.default_rng(0).permutation(64)[:40])
    scored = trainer.score_pairs(trainer.train_dataset)
    scores, clean = scored["correlation"].numpy()[chosen], scored["is_clean"].numpy()[chosen]
    above = scores[clean][:, None] - scores[~clean]
    assert final["noise_detection_auroc"] == pytest.approx(((above > 0) + 0.5 * (above == 0)).mean(), abs=1e-6)

    runs = [figures(tmp_path / str(limit), max_train_pairs=limit)[1] for limit in (None, 64, 10_000)]
    assert all(run["final"] == runs[0]["final"] and "scored_train_pairs" not in run for run in runs)
    assert runs[0]["final"]["noise_detection_num_scored"] == 64
