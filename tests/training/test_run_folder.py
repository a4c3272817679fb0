"""What a run leaves behind must be complete, readable as strict JSON, and tell no secrets."""

import json
import math

import pytest
from testing import tiny_models

from hf_dissect import DissectTrainer, DissectTrainingArguments
from hf_dissect.data import shuffle_captions
from hf_dissect.summary import SHOWN_SETTINGS
from hf_dissect.training.checkpoints import find_last_checkpoint
from hf_dissect.training.run_folder import list_changed_settings, write_json

METRICS = {
    "name",
    "strategy",
    "seed",
    "steps",
    "num_pairs",
    "final",
    "selection",
    "times",
    "bad_rows",
    "settings",
    "versions",
}


@pytest.fixture
def trainer(tmp_path) -> DissectTrainer:
    """A trainer without a recipe, trained for two epochs with two unreadable rows; nothing is written yet."""
    model, processor = tiny_models.tiny_clip()
    pairs = shuffle_captions(tiny_models.tiny_pairs(64), rate=0.25)
    rows = pairs.to_list()
    rows[5]["caption"], rows[9]["image"] = None, {"bytes": b"GIF89a", "path": None}
    trainer = DissectTrainer(
        model=model,
        processing_class=processor,
        train_dataset=type(pairs).from_list(rows, features=pairs.features),
        eval_dataset=tiny_models.tiny_pairs(16, seed=1),
        args=DissectTrainingArguments(
            str(tmp_path / "run"),
            per_device_train_batch_size=16,
            num_train_epochs=2,
            max_bad_fraction=0.1,
            logging_steps=2,
            save_run_folder=False,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
    )
    trainer.train()
    return trainer


def test_metrics_say_what_was_trained_and_what_came_out(trainer, tmp_path):
    metrics = trainer.finish(name="mine", more_figures=lambda: {"zero_shot_accuracy@1": 0.5})
    assert metrics == json.loads((tmp_path / "run" / "metrics.json").read_text()) and metrics.keys() == METRICS
    assert (metrics["name"], metrics["strategy"], metrics["seed"], metrics["steps"]) == ("mine", "dissect", 42, 8)
    assert metrics["final"]["zero_shot_accuracy@1"] == 0.5 and metrics["final"]["recall_sum"] > 0
    assert not [key for key in metrics["final"] if "runtime" in key or "per_second" in key or key.endswith("epoch")]
    # 62 readable pairs are scored at the end; 16 pairs are mismatched, less those that cannot be read.
    assert metrics["final"]["noise_detection_num_scored"] == 62
    times = metrics["times"]
    assert times["total_s"] == pytest.approx(sum(seconds for part, seconds in times.items() if part != "total_s"))
    assert min(times.values()) > 0
    assert metrics["bad_rows"]["count"] == 2 and metrics["bad_rows"]["ids"] == [5, 9]
    assert sum(metrics["bad_rows"]["reasons"].values()) == 2


def test_files_beside_the_model(trainer, tmp_path):
    trainer.finish()
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names >= {"model.safetensors", "ledger.safetensors", "metrics.json", "report.html", "README.md"}
    assert "recipe.yaml" not in names and not [name for name in names if name.endswith(".tmp")]
    assert "mismatched" in (tmp_path / "run" / "report.html").read_text().lower()


def test_the_trainer_can_be_used_after_the_folder_was_written(trainer):
    metrics = trainer.finish()
    again = trainer.evaluate()
    assert again["eval_recall_sum"] == metrics["final"]["recall_sum"]


def test_parts_can_be_left_out(trainer):
    metrics = trainer.finish(retrieval=False, noise_detection=False)
    assert metrics["final"] == {}


def test_what_could_not_be_computed_is_null(trainer):
    metrics = trainer.run_metrics({"a": math.nan, "b": [math.inf, 1.0], "c": {"d": -math.inf}})
    assert metrics["final"] == {"a": None, "b": [None, 1.0], "c": {"d": None}}


def test_settings_are_those_that_differ_and_hold_no_paths_or_tokens():
    args = DissectTrainingArguments(
        "/home/me/runs/x", learning_rate=0.25, selection_ratio=0.3, hub_token="hf_secret", run_name="mine"
    )
    settings = list_changed_settings(args, SHOWN_SETTINGS)
    assert settings["learning_rate"] == 0.25 and settings["selection_strategy"] == "dissect"
    assert settings["selection_ratio"] == 0.3 and "weight_decay" not in settings
    assert "hf_secret" not in json.dumps(settings) and "/home/me" not in json.dumps(settings)
    assert settings.keys() == {"selection_strategy", "selection_ratio", "learning_rate"}


def test_the_last_checkpoint_is_the_last_complete_one(tmp_path):
    assert find_last_checkpoint(tmp_path / "none") is None
    for name, state in {"9": "{}", "10": "{}", "100": '{"global_step": 1', "best": "{}"}.items():
        (tmp_path / f"checkpoint-{name}").mkdir()
        (tmp_path / f"checkpoint-{name}" / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-200").mkdir()
    assert find_last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_a_failed_write_leaves_the_former_file(tmp_path):
    write_json(tmp_path / "metrics.json", {"a": 1})
    with pytest.raises(ValueError):
        write_json(tmp_path / "metrics.json", {"a": math.nan})
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"a": 1}
