"""One bar a run, a line an evaluation, and nothing else."""

import re

import pytest
from testing.tiny_recipe import STEPS, tiny_recipe
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerControl, TrainerState

from hf_dissect.runs.run import build_trainer
from hf_dissect.training.progress import RunProgress


@pytest.fixture
def progress():
    progress = RunProgress()
    yield progress
    progress.close()


def test_a_run_shows_its_bar_and_a_line_for_each_evaluation(tmp_path, capsys):
    trainer = build_trainer(tiny_recipe(tmp_path, training={"eval_strategy": "epoch"}))
    trainer.args.save_run_folder = False
    trainer.train()
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert len(lines) == 2
    for epoch, line in enumerate(lines, 1):
        pattern = rf"epoch {epoch}\.0: recall sum N, image to text R@1 N, text to image R@1 N, loss \d"
        assert re.match(pattern.replace("N", r"\d+\.\d"), line)
    last = re.split(r"[\r\n]+", shown.err.strip())[-1]
    assert f"{STEPS}/{STEPS}" in last and re.search(
        r"loss \d.*kept 50%, mismatched kept \d+%, scoring time \d+%", last
    )
    assert "{" not in shown.err


def test_a_log_file_is_not_filled_with_bars(progress, capsys):
    state, control = TrainerState(max_steps=1000, is_world_process_zero=True), TrainerControl()
    progress.on_train_begin(None, state, control)
    for step in range(1, 1001):
        state.global_step = step
        progress.on_step_end(None, state, control)
        progress.on_log(None, state, control, logs={"loss": 1.0})
    progress.on_train_end(None, state, control)
    bars = re.split(r"[\r\n]+", capsys.readouterr().err.strip())
    assert len(bars) <= 3 and "1000/1000" in bars[-1] and "loss 1" in bars[-1]


def test_a_resumed_run_starts_where_it_was(progress):
    state = TrainerState(max_steps=100, global_step=60, is_world_process_zero=True)
    progress.on_train_begin(None, state, TrainerControl())
    assert (progress.training_bar.n, progress.training_bar.total) == (60, 100)
    state.global_step = 61
    progress.on_step_end(None, state, TrainerControl())
    assert progress.current_step == 61 and progress.training_bar.n in (60, 61)


def test_only_the_first_process_draws(progress, capsys):
    state, control = TrainerState(max_steps=3, is_world_process_zero=False), TrainerControl()
    progress.on_train_begin(None, state, control)
    progress.on_log(None, state, control, logs={"loss": 1.0})
    progress.on_evaluate(None, state, control, metrics={"eval_recall_sum": 1.0})
    assert progress.training_bar is None and capsys.readouterr().err == ""


def test_the_bar_can_be_switched_off(tmp_path):
    def kinds(**training):
        callbacks = build_trainer(tiny_recipe(tmp_path, training=training)).callback_handler.callbacks
        shown = [callback for callback in callbacks if isinstance(callback, ProgressCallback | PrinterCallback)]
        return [type(callback) for callback in shown]

    assert kinds() == [RunProgress] and kinds(disable_tqdm=True) == [PrinterCallback]
