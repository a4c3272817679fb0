"""A run that ends early, whatever the reason, goes on from its last checkpoint and ends as if it had not."""

import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from safetensors.torch import load_file
from testing.faulty_run import KILLED_IN, SAVE_STEPS, STEPS, make_trainer, train_until_killed
from testing.launched import exit_code_of
from testing.tiny_recipe import write_tiny_recipe
from transformers import TrainerCallback

from hf_dissect import DissectTrainer
from hf_dissect.cli import main
from hf_dissect.report.live import LIVE_FILES
from hf_dissect.training.checkpoints import (
    UNFINISHED_FOLDER,
    CheckpointError,
    find_last_checkpoint,
    publish,
    remove_unfinished,
)
from hf_dissect.training.interruption import DataWorkerDied, StoppedBySignal, StopRequest, explain_dead_worker
from hf_dissect.training.non_finite import NonFiniteLossError

ROOT = Path(__file__).parents[2]
STOP = 11  # neither a step that logs nor one that saves; the last checkpoint is that of step 9
TIMES = ("time", "per_second")


class At(TrainerCallback):
    """Does something at the end of one step."""

    def __init__(self, step: int, action):
        self.step = step
        self.action = action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


def interrupt() -> None:
    raise KeyboardInterrupt


def outcome(trainer: DissectTrainer) -> dict:
    """All that a run leaves behind and that does not depend on the clock."""
    metrics = {**trainer.run_metrics({}), **trainer.summary.gather_metrics(trainer.ranks)}
    tensors = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    tensors |= {f"ledger {name}": trainer.ledger.column(name).clone() for name in trainer.ledger.columns}
    if trainer.ledger.ids is not None:
        tensors["ids"] = trainer.ledger.ids.clone()
    return {
        "tensors": {name: tensor.numpy().tobytes() for name, tensor in tensors.items()},
        "choices": pq.read_table(Path(trainer.args.output_dir) / "selection.parquet").to_pylist(),
        "logs": without_times(trainer.state.log_history),
        "metrics": {name: metrics[name] for name in ("steps", "selection", "bad_rows", "num_pairs")},
        "bad rows": trainer.bad_rows.state_dict(),
        "best": trainer.state.best_model_checkpoint and Path(trainer.state.best_model_checkpoint).name,
    }


def without_times(log_history: list[dict]) -> list[dict]:
    return [
        {key: value for key, value in entry.items() if key != "train_loss" and not any(part in key for part in TIMES)}
        for entry in log_history
    ]


def resumed(folder: Path, **settings) -> dict:
    trainer = make_trainer(folder, **settings)
    trainer.train(resume_from_checkpoint=True)
    return outcome(trainer)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict:
    """What the run of `make_trainer` leaves behind when nothing happens to it."""
    trainer = make_trainer(tmp_path_factory.mktemp("whole"))
    trainer.train()
    return outcome(trainer)


# ---- stopped between two checkpoints: the same to the last bit ----

CASES = {
    "map, warm-up": dict(selection_options={"variant": "warmup"}, dropout=0.1),
    "map, momentum, two workers, two micro-batches": dict(
        dataloader_num_workers=2, gradient_accumulation_steps=2, bad_row=True
    ),
    "map, random, evaluation, the best model at the end": dict(
        selection_strategy="random",
        selection_options=None,
        eval_strategy="steps",
        eval_steps=SAVE_STEPS,
        load_best_model_at_end=True,
        metric_for_best_model="recall_sum",
        dropout=0.1,
    ),
    "stream, warm-up, two workers": dict(
        stream=True, dataloader_num_workers=2, selection_options={"variant": "warmup"}, bad_row=True
    ),
    "stream, momentum, two micro-batches": dict(stream=True, gradient_accumulation_steps=2, dropout=0.1),
    "map, info batch, two micro-batches": dict(
        selection_strategy="info_batch", selection_options={"annealing": 0.8}, gradient_accumulation_steps=2
    ),
    "stream, scan": dict(stream=True, selection_strategy="scan", selection_options={"warmup_epochs": 0, "cycle": 1}),
    "stream, forgetting, two workers": dict(
        stream=True, dataloader_num_workers=2, selection_strategy="forgetting", selection_options=None
    ),
    "stream, small loss, two workers": dict(
        stream=True, dataloader_num_workers=2, selection_strategy="small_loss", selection_options=None
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_the_uninterrupted_one(case, tmp_path):
    settings = CASES[case]
    trainer = make_trainer(tmp_path / "whole", **settings)
    trainer.train()
    whole = outcome(trainer)
    assert (
        len(whole["choices"]) == (126 if settings.get("bad_row") else 128) * trainer.args.gradient_accumulation_steps
    )
    interrupted = make_trainer(tmp_path / "run", **settings)
    interrupted.add_callback(At(STOP, interrupt))
    with pytest.raises(KeyboardInterrupt):
        interrupted.train()
    state = json.loads((tmp_path / "run" / "checkpoint-9" / "dissect_state.json").read_text())
    trainer = make_trainer(tmp_path / "run", **settings)
    mean_loss = trainer.train(resume_from_checkpoint=True).training_loss
    assert outcome(trainer) == whole
    assert whole["metrics"]["bad_rows"]["count"] == settings.get("bad_row", 0)
    spent = trainer.times.measure_so_far()
    assert all(spent[part] > seconds > 0 for part, seconds in state["parts"]["times"].items()), (spent, state["parts"])
    # The loss that `train` returns is that of its own steps; the logs, each of 4 steps, are those of the whole run.
    logged = sum(4 * entry["loss"] for entry in whole["logs"] if entry["step"] > 9 and "loss" in entry)
    assert mean_loss == pytest.approx((logged - state["ranks"][0]["loss_since_log"]["loss"]) / (STEPS - 9), rel=1e-5)
    if settings.get("load_best_model_at_end"):
        best = {json.loads(path.read_text())["best_model_checkpoint"] for path in tmp_path.rglob("trainer_state.json")}
        assert all(Path(name).parent.parent == tmp_path and Path(name).is_dir() for name in best), best


def test_the_checkpoint_of_the_last_step_of_an_epoch_has_the_figures_of_the_epoch(tmp_path):
    settings = {"save_steps": 8, "eval_strategy": "epoch", "logging_strategy": "epoch"}
    trainer = make_trainer(tmp_path / "whole", **settings)
    trainer.train()
    whole = outcome(trainer)
    assert [entry["step"] for entry in whole["logs"] if "eval_loss" in entry] == [8, 16]
    trainer = make_trainer(tmp_path / "run", **settings)
    trainer.add_callback(At(STOP, interrupt))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert resumed(tmp_path / "run", **settings) == whole


# ---- killed while a checkpoint is written ----


WRITTEN = ("README.md", "report.png", *LIVE_FILES)  # the card at each save, and what shows the run meanwhile


@pytest.mark.parametrize("place", KILLED_IN)
def test_killed_while_saving(place, tmp_path, whole):
    folder = tmp_path / place
    assert exit_code_of(train_until_killed, folder, place) == -signal.SIGKILL
    written = {path.name for path in (folder / UNFINISHED_FOLDER / "checkpoint-6").iterdir()}
    assert "model.safetensors" in written and ("trainer_state.json" in written) == (place == KILLED_IN[1])
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-3"]
    assert resumed(folder) == whole
    assert {path.name for path in folder.iterdir()} == {
        *(f"checkpoint-{step}" for step in (3, 6, 9, 12, 15, 16)),
        "selection.parquet",
        *WRITTEN,
    }


def checkpoint(folder: Path, content: str = "{}") -> Path:
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(content)
    return folder


def test_a_checkpoint_replaces_one_of_the_same_name_at_once(tmp_path):
    old, new = checkpoint(tmp_path / "checkpoint-5", '"old"'), tmp_path / UNFINISHED_FOLDER / "checkpoint-5"
    publish(checkpoint(new, '"new"'), old)
    assert (old / "trainer_state.json").read_text() == '"new"'
    assert not list((tmp_path / UNFINISHED_FOLDER).iterdir())
    publish(new, old)  # what another process of the same node does: it finds it done
    assert (old / "trainer_state.json").read_text() == '"new"'
    with pytest.raises(FileNotFoundError):
        publish(new, tmp_path / "checkpoint-6")


def test_killed_between_taking_an_old_checkpoint_away_and_naming_the_new_one(tmp_path):
    unfinished = tmp_path / UNFINISHED_FOLDER
    checkpoint(unfinished / "checkpoint-5.replaced", '"old"')
    checkpoint(unfinished / "checkpoint-5", '"new"')
    assert find_last_checkpoint(tmp_path) is None
    remove_unfinished(tmp_path)
    assert find_last_checkpoint(tmp_path) == tmp_path / "checkpoint-5"
    assert (tmp_path / "checkpoint-5" / "trainer_state.json").read_text() == '"old"'
    assert not unfinished.exists()


def test_the_last_complete_checkpoint_is_not_a_damaged_one(tmp_path, caplog):
    assert find_last_checkpoint(tmp_path / "nowhere") is None
    checkpoint(tmp_path / "checkpoint-9")
    checkpoint(tmp_path / "checkpoint-10")
    checkpoint(tmp_path / "checkpoint-100", '{"cut sho')
    (tmp_path / "checkpoint-200").mkdir()
    (tmp_path / "checkpoint-300").write_text("a file")
    checkpoint(tmp_path / "checkpoint-best")
    checkpoint(tmp_path / "checkpoint-500-copy")
    checkpoint(tmp_path / UNFINISHED_FOLDER / "checkpoint-400")
    assert find_last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    passed_over = {record.args[0].name for record in caplog.records}
    assert passed_over == {"checkpoint-100", "checkpoint-200", "checkpoint-300"}


# ---- the disk is full ----


@contextmanager
def room_made_afterwards():
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    transformers.utils.logging.disable_progress_bar()  # what is printed may be written to a file, too
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        transformers.utils.logging.enable_progress_bar()


def fill_disk(room: int = 16) -> None:
    """From now on no file of this process may grow beyond `room`; Python ignores the signal, so that writes fail."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def full_from(method: str, *, before: bool) -> type[DissectTrainer]:
    """A trainer whose second checkpoint finds the disk full before or after one of its methods."""

    def filling(self, *arguments, **keywords):
        second = self.state.global_step == 2 * SAVE_STEPS
        if second and before:
            fill_disk()
        result = getattr(super(kind, self), method)(*arguments, **keywords)
        if second and not before:
            fill_disk()
        return result

    kind = type("FullDiskTrainer", (DissectTrainer,), {method: filling})
    return kind


class FullForTheTokenizer(DissectTrainer):
    """Saves the processor last; in the second checkpoint only its small files find room."""

    def _save(self, *arguments, **keywords):
        processor, self.processing_class = self.processing_class, None
        super()._save(*arguments, **keywords)
        self.processing_class = processor
        if self.state.global_step == 2 * SAVE_STEPS:
            fill_disk(room=4096)
        processor.save_pretrained(arguments[0])


class FullForTheState(DissectTrainer):
    """Finds the disk full when the state of the second checkpoint is collected."""

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        state_dict = self.selector.state_dict

        def filling():
            if self.state.global_step == 2 * SAVE_STEPS:
                fill_disk()
            return state_dict()

        self.selector.state_dict = filling


WRITES = {
    "record of the selection": full_from("_save_checkpoint", before=True),
    "ledger": full_from("save_model", before=True),
    "weights": full_from("_save", before=True),
    "tokenizer": FullForTheTokenizer,
    "optimiser": full_from("_save_optimizer_and_scheduler", before=True),
    "state of the Trainer": full_from("_save_rng_state", before=False),
    "state of the selection": FullForTheState,
}


@pytest.mark.parametrize("what", WRITES)
def test_a_full_disk_costs_nothing_but_the_checkpoint(what, tmp_path, whole):
    trainer = make_trainer(tmp_path, WRITES[what])
    with room_made_afterwards(), pytest.raises(CheckpointError) as told:
        trainer.train()
    message = str(told.value)
    assert "checkpoint of step 6 could not be written" in message and str(tmp_path / "checkpoint-3") in message
    assert str(told.value.__cause__) in message
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-3", "selection_parts", *WRITTEN}
    assert resumed(tmp_path) == whole


# ---- not a number ----


def test_weights_that_are_not_finite_are_never_saved(tmp_path, whole):
    trainer = make_trainer(tmp_path)
    weight = trainer.model.visual_projection.weight
    trainer.add_callback(At(6, lambda: weight.data[0, 0].fill_(torch.nan)))
    with pytest.raises(NonFiniteLossError, match=r"After step 6 .*visual_projection.*checkpoint-3"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    assert resumed(tmp_path) == whole


def test_a_loss_that_is_not_finite_names_the_checkpoint(tmp_path, whole):
    class Poisoned(DissectTrainer):
        def compute_loss(self, *arguments, **keywords):
            loss = super().compute_loss(*arguments, **keywords)
            return loss * torch.inf if self.state.global_step == 7 else loss

    trainer = make_trainer(tmp_path, Poisoned)
    with pytest.raises(NonFiniteLossError, match=r"At step 7 the loss is not finite.*checkpoint-6"):
        trainer.train()
    assert resumed(tmp_path) == whole


# ---- told to end ----


@pytest.mark.parametrize(
    "settings",
    [
        {"save_strategy": "no"},
        # Ends inside an epoch: what is due at the end of an epoch is not done then.
        {"save_strategy": "epoch", "eval_strategy": "epoch", "logging_strategy": "epoch"},
        # Ends with an epoch: what is due then is done, as the resumed run begins behind it.
        {"save_strategy": "no", "eval_strategy": "epoch", "logging_strategy": "epoch", "stop": 7},
        # Ends with an evaluation that is no better: saves all the same.
        {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "recall_sum"},
    ],
)
def test_sigterm_saves_and_the_run_goes_on(settings, tmp_path):
    settings = dict(settings)
    stop = settings.pop("stop", STOP)
    trainer = make_trainer(tmp_path / "whole", **settings)
    trainer.train()
    whole = outcome(trainer)
    trainer = make_trainer(tmp_path / "run", **settings)
    trainer.add_callback(At(stop, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    with pytest.raises(StoppedBySignal) as told:
        trainer.train()
    # The step whose candidates the request was met with is done, too.
    assert told.value.checkpoint == str(tmp_path / "run" / f"checkpoint-{stop + 1}") and told.value.code == 143
    assert told.value.checkpoint in str(told.value)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert resumed(tmp_path / "run", **settings) == whole


def test_sigterm_behind_the_last_step_still_leaves_a_checkpoint(tmp_path):
    class AtTheEnd(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            os.kill(os.getpid(), signal.SIGTERM)

    trainer = make_trainer(tmp_path, save_strategy="no")
    trainer.add_callback(AtTheEnd())
    with pytest.raises(StoppedBySignal, match="checkpoint-"):
        trainer.train()
    assert find_last_checkpoint(tmp_path).name == f"checkpoint-{trainer.state.max_steps}"


def test_a_second_sigterm_ends_at_once():
    child = os.fork()
    if child == 0:
        request = StopRequest()
        with request.listen():
            os.kill(os.getpid(), signal.SIGTERM)
            survived = request.made
            os.kill(os.getpid(), signal.SIGTERM)
        os._exit(1 if survived else 2)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM, status


# ---- a data worker dies ----


@pytest.mark.parametrize("stream", [False, True])
def test_a_data_worker_is_killed(stream, tmp_path, whole):
    settings = {"stream": stream, "dataloader_num_workers": 2}
    trainer = make_trainer(tmp_path, **settings)
    trainer.add_callback(At(STOP, lambda: multiprocessing.active_children()[0].kill()))
    with pytest.raises(DataWorkerDied, match="checkpoint-"):
        trainer.train()
    assert not multiprocessing.active_children()
    found = resumed(tmp_path, **settings)
    if not stream:
        assert found == whole  # workers or none: the same batches
    assert found["metrics"]["steps"] == STEPS and len(found["choices"]) == 128


def test_a_data_worker_dies_while_a_batch_is_taken_over_from_it(tmp_path):
    def work(queue):
        queue.put(torch.zeros(4))
        signal.pause()

    context = torch.multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    worker = context.Process(target=work, args=(queue,))
    worker.start()
    assert queue._reader.poll(20)
    worker.kill()
    worker.join()
    checkpoint(tmp_path / "checkpoint-3")
    with pytest.raises(DataWorkerDied, match="checkpoint-3"), explain_dead_worker(tmp_path):
        queue.get()
    with pytest.raises(FileNotFoundError, match="nowhere"), explain_dead_worker(tmp_path):
        open(tmp_path / "nowhere")


def test_the_death_of_a_data_worker_strikes_in_the_middle_of_something_else(tmp_path):
    @contextmanager
    def cleaning_up():
        try:
            yield
        except RuntimeError:
            {}.pop("made by a thread that was about to start")

    with pytest.raises(DataWorkerDied, match=r"DataLoader worker \(pid 7\)"), explain_dead_worker(tmp_path):
        with cleaning_up():
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    with pytest.raises(RuntimeError, match="something else"), explain_dead_worker(tmp_path):
        raise RuntimeError("something else")


# ---- the command ----

STREAMED = [
    *("data.streaming=true", "data.noise_rate=0", "data.num_workers=2", "selection.record=true"),
    *("training.num_train_epochs=1", "training.max_steps=40", "training.eval_strategy=steps", "training.eval_steps=8"),
    *("training.save_strategy=steps", "training.save_steps=4"),
]


def left_behind(run: Path) -> dict:
    metrics = json.loads((run / "metrics.json").read_text())
    report = json.loads((run / "report_data.json").read_text())
    return {
        "tensors": {
            (name, key): tensor.numpy().tobytes()
            for name in ("model.safetensors", "ledger.safetensors")
            for key, tensor in load_file(run / name).items()
        },
        "choices": pq.read_table(run / "selection.parquet").to_pylist(),
        "metrics": {key: value for key, value in metrics.items() if key != "times"},
        "logs": without_times(report["log_history"]),
    }


def train_until(line: str, more: list[str], then) -> tuple[int, str]:
    """Start the command, wait for a line of its output that begins with `line`, and do something to the process."""
    command = [sys.executable, "-m", "hf_dissect.cli", "train", "tiny.yaml", *STREAMED, "--output-dir", "run", *more]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **streams) as running:
        reached = any(told.startswith(line) for told in running.stdout)
        if reached:
            then(psutil.Process(running.pid))
        _, errors = running.communicate(timeout=300)
    assert reached, errors
    return running.returncode, errors.splitlines()[-1]


@pytest.mark.slow
def test_the_command_goes_on_after_the_death_of_a_data_worker_and_after_sigterm(tmp_path, monkeypatch):
    """Start the command twice and train 40 steps twice."""
    monkeypatch.chdir(tmp_path)
    write_tiny_recipe(tmp_path / "tiny.yaml")
    status, told = train_until("epoch 0.2", [], lambda process: process.children()[0].kill())
    checkpoint = find_last_checkpoint("run")
    assert status == 2 and "A data worker died" in told and f"Resume from the last checkpoint: {checkpoint}." in told
    assert 4 <= int(checkpoint.name.split("-")[1]) < 40
    without_saving = ["--resume", "training.save_strategy=no"]
    status, told = train_until("epoch 0.4", without_saving, lambda process: process.terminate())
    checkpoint = find_last_checkpoint("run")
    assert status == 143 and f"Stopped by SIGTERM; the run can be resumed from {checkpoint}." in told, told
    assert 12 <= int(checkpoint.name.split("-")[1]) < 40
    assert main(["train", "tiny.yaml", *STREAMED, "--output-dir", "run", "--resume"]) == 0
    assert main(["train", "tiny.yaml", *STREAMED, "--output-dir", "whole"]) == 0
    assert left_behind(Path("run")) == left_behind(Path("whole"))
