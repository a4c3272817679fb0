"""A run leaves in its folder what shows it while it trains: every log as a line, and its present state."""

import json
import math
import os

import numpy as np
import pytest
from testing import faulty_run, tiny_models
from testing.tiny_recipe import tiny_recipe
from transformers import TrainerCallback

from hf_dissect import DissectTrainer
from hf_dissect.report.live import LIVE_FILE, LOG_FILE, LiveRun, LogReader, append_log
from hf_dissect.runs.run import run_recipe
from hf_dissect.training.interruption import DataWorkerDied
from hf_dissect.training.non_finite import NonFiniteLossError


def read_lines(folder):
    return [json.loads(line) for line in (folder / LOG_FILE).read_text().splitlines()]


class Looks(TrainerCallback):
    """Reads the folder in the midst of training, after each log."""

    def __init__(self, folder):
        self.folder, self.seen = folder, []

    def on_log(self, args, state, control, **kwargs):
        self.seen.append((LiveRun.load(self.folder), LogReader(self.folder).read()))


def test_every_log_is_a_line_and_the_state_has_pairs_with_pictures(tmp_path):
    trainer = faulty_run.make_trainer(tmp_path, eval_strategy="steps", eval_steps=8)
    trainer.add_callback(looks := Looks(tmp_path))
    trainer.train()
    assert read_lines(tmp_path) == json.loads(json.dumps(trainer.state.log_history))
    assert [len(log) for _, log in looks.seen] == list(range(1, len(looks.seen) + 1))
    first, last = looks.seen[0][0], LiveRun.load(tmp_path)
    assert (first.state, first.step, first.max_steps) == ("training", 4, 16) and first.summary.name == "dissect"
    assert (last.state, last.step) == ("trained", 16) and last.summary.log_history == []
    pairs = last.summary.best_kept
    monitor = trainer.monitor.last_epoch.best_kept
    assert [pair.sample_id for pair in pairs] == [pair.sample_id for pair in monitor] and len(pairs) == 12
    caption = trainer.train_dataset[trainer.train_dataset.find(pairs[0].sample_id)]["caption"]
    assert pairs[0].caption == caption and pairs[0].image.size == (32, 32)
    assert last.summary.metrics["bad_rows"]["count"] == 0 and last.summary.metrics["final"]["recall_sum"] >= 0


def test_a_resumed_run_replaces_the_logs_of_the_steps_that_it_repeats(tmp_path):
    faulty_run.make_trainer(tmp_path, logging_steps=1, max_steps=16).train()
    whole = read_lines(tmp_path)
    append_log(tmp_path, {"step": 99, "loss": 1.0})
    with open(tmp_path / LOG_FILE, "a") as opened:
        opened.write('{"step": 100, "lo')  # killed while it wrote
    resumed = faulty_run.make_trainer(tmp_path, logging_steps=1, max_steps=16)
    resumed.train(str(tmp_path / "checkpoint-9"))
    steps = [entry["step"] for entry in read_lines(tmp_path)]
    assert steps == [*range(1, 17), 16] == [entry["step"] for entry in whole]
    assert [entry.get("loss") for entry in read_lines(tmp_path)] == [entry.get("loss") for entry in whole]


def test_lines_are_whole_and_anything_else_is_passed_over(tmp_path):
    reader = LogReader(tmp_path)
    assert reader.read() is None
    append_log(tmp_path, {"step": 1, "loss": math.nan, "note": "\ud800 é\n"})
    assert reader.read() == [{"step": 1, "loss": None, "note": "\ud800 é\n"}]
    path = tmp_path / LOG_FILE
    with open(path, "ab") as opened:
        opened.write(b'[1]\n\xff\xfe\n{"step": 2, ')
    assert len(reader.read()) == 1
    append_log(tmp_path, {"step": np.int64(3), "loss": np.float32(0.5)})  # begins a line of its own
    assert reader.read()[1:] == [{"step": 3, "loss": 0.5}]
    os.truncate(path, 0)
    append_log(tmp_path, {"step": 1})
    assert reader.read() == [{"step": 1}]
    path.unlink()
    assert reader.read() is None
    path.mkdir()
    assert reader.read() is None


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"format_version": 2}', '{"format_version": 1}', "[" * 10**5]
)
def test_a_damaged_state_is_none(tmp_path, content):
    (tmp_path / LIVE_FILE).write_text(content)
    assert LiveRun.load(tmp_path) is None


def test_the_live_files_do_not_change_the_run(tmp_path, monkeypatch):
    """Neither data with random transforms nor a folder that cannot be written to."""

    def train(name, observe=True):
        pairs = tiny_models.tiny_pairs(64)
        table = pairs.with_transform(
            lambda rows: {**rows, "caption": [f"{text} {np.random.randint(9)}" for text in rows["caption"]]}
        )
        trainer = faulty_run.make_trainer(tmp_path / name, max_steps=6, logging_steps=1, save_strategy="no")
        trainer.train_dataset = type(trainer.train_dataset).from_dataset(table)
        trainer.summary._pairs._dataset = trainer.train_dataset
        if not observe:
            trainer.remove_callback(trainer.observer)
        trainer.train()
        return [entry.get("loss") for entry in trainer.state.log_history]

    observed = train("a")
    assert LiveRun.load(tmp_path / "a").summary.best_kept
    assert observed == train("b", observe=False) and not (tmp_path / "b" / LIVE_FILE).exists()


def test_files_that_cannot_be_written_end_nothing(tmp_path, caplog):
    (tmp_path / LOG_FILE).mkdir()
    (tmp_path / LIVE_FILE).mkdir()
    (tmp_path / LIVE_FILE / "x").touch()
    trainer = faulty_run.make_trainer(tmp_path, max_steps=4, logging_steps=1)
    trainer.train()
    assert trainer.state.global_step == 4
    warnings = [record.message for record in caplog.records if "training continues" in record.message]
    assert len(warnings) == 3  # the beginning of the log, its lines, and the state, once each


def test_the_reason_of_an_end_is_shown(tmp_path):
    class Diverging(DissectTrainer):
        def _compute_loss(self, *args, **kwargs):
            return super()._compute_loss(*args, **kwargs) * (math.nan if self.state.global_step == 5 else 1)

    trainer = faulty_run.make_trainer(tmp_path, Diverging)
    with pytest.raises(NonFiniteLossError):
        trainer.train()
    live = LiveRun.load(tmp_path)
    assert live.state == "stopped" and live.reason.startswith("NonFiniteLossError: At step 5 the loss is not finite")
    assert [alert["subject"] for alert in live.summary.metrics["alerts"]] == ["not_finite"]


def test_results_of_an_earlier_run_are_known_by_their_content(tmp_path):
    recipe = tiny_recipe(tmp_path / "run")
    run_recipe(recipe)
    assert LiveRun.load(tmp_path / "run").earlier == {}
    run_recipe(recipe)
    assert LiveRun.load(tmp_path / "run").earlier.keys() == {"metrics.json", "report_data.json"}


def test_the_death_of_a_data_worker_is_not_taken_for_a_fault_of_its_own(tmp_path, monkeypatch):
    """A signal raises it wherever the process is, which may be here."""
    trainer = faulty_run.make_trainer(tmp_path, max_steps=4, logging_steps=1)

    def die(*args):
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    monkeypatch.setattr(trainer.summary, "find_alerts", die)
    with pytest.raises(DataWorkerDied, match="none yet"):
        trainer.train()
    assert LiveRun.load(tmp_path).reason.startswith("DataWorkerDied: A data worker died")
