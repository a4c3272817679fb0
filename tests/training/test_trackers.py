"""What trackers are told through `report_to`: every figure of a run, as a plain number, without code of our own."""

import json
from pathlib import Path

import pytest
from testing.tiny_recipe import tiny_recipe
from transformers import TrainerCallback

from hf_dissect.data import make_scene_classes
from hf_dissect.runs.run import build_trainer, run_recipe
from hf_dissect.training.run_folder import write_run_folder

SELECTION = {"kept_share", "correlation_kept", "correlation_dropped", "noise_kept", "noise_candidates"}
CLASSES = make_scene_classes(1).features["label"].names
RUN = {
    "evaluation": {"zero_shot": {"classes": CLASSES, "templates": ["a {}"]}},
    "training": {"eval_strategy": "epoch"},
}


class Tracker(TrainerCallback):
    """Keeps what it is told, as the callbacks of the trackers are."""

    def __init__(self):
        self.told: list[dict] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.told.append(dict(logs))


def test_all_figures_are_plain_finite_numbers_with_plain_names(tmp_path):
    trainer = build_trainer(tiny_recipe(tmp_path / "run", **RUN))
    tracker = Tracker()
    trainer.add_callback(tracker)
    trainer.args.save_run_folder = False
    trainer.train()
    metrics = write_run_folder(trainer, more_figures=lambda: {"zero_shot_accuracy@1": 0.5})
    told = {key: value for entry in tracker.told for key, value in entry.items()}
    assert {f"selection_{name}" for name in SELECTION} | {"loss", "selection_scoring_time_share"} <= set(told)
    assert all(type(value) in (int, float) for value in told.values())
    assert all(key.isascii() and " " not in key and "/" not in key for key in told)
    assert {key.removeprefix("test_"): value for key, value in told.items() if key.startswith("test_")}.items() >= (
        metrics["final"].items()
    )
    json.dumps(told, allow_nan=False)


def test_runs_are_named_by_their_folder(tmp_path):
    # A tracker that ends its run with the training goes on with it, for the final figures, by this name only.
    assert tiny_recipe(tmp_path / "tiny-2").training_arguments()["run_name"] == "tiny-2"
    named = tiny_recipe(tmp_path / "tiny-2", training={"run_name": "mine"})
    assert named.training_arguments()["run_name"] == "mine"


def test_tensorboard_shows_training_evaluation_and_final_figures(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "run"
    training = {**RUN["training"], "report_to": "tensorboard"}
    metrics = run_recipe(tiny_recipe(folder, evaluation=RUN["evaluation"], training=training))
    (place,) = Path(folder, "runs").iterdir()
    events = EventAccumulator(str(place)).Reload()
    last = {tag: events.Scalars(tag)[-1] for tag in events.Tags()["scalars"]}
    assert {f"train/selection_{name}" for name in SELECTION} | {"train/loss", "eval/recall_sum"} <= set(last)
    final = {key: last[f"test/{key}"].value for key in metrics["final"]}
    assert final == pytest.approx(metrics["final"], rel=1e-6)
    assert {event.step for event in events.Scalars("train/selection_noise_kept")} == {2, 4, 6, 8}
