"""Small trainings in processes of their own, which tell how far they are and can be cut short; for `faults.py`."""

import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from safetensors import safe_open
from transformers import TrainerCallback

from hf_dissect import DissectTrainer, make_scenes
from hf_dissect.data import shuffle_captions
from hf_dissect.recipe.recipe import Recipe
from hf_dissect.runs.run import build_trainer
from hf_dissect.training.checkpoints import CheckpointError, find_last_checkpoint
from hf_dissect.training.interruption import DataWorkerDied, StoppedBySignal
from hf_dissect.training.non_finite import NonFiniteLossError

STEPS = 8
PAIRS = 32
TOWER = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
RECIPE = {
    "name": "faults",
    "model": {
        "config": {
            "model_type": "clip",
            "projection_dim": 16,
            "vision_config": {**TOWER, "image_size": 32, "patch_size": 16, "attention_dropout": 0.1},
            "text_config": {**TOWER, "max_position_embeddings": 16, "attention_dropout": 0.1},
        },
        "vocab_size": 600,
        "max_caption_length": 16,
    },
    "data": {"scenes_train": PAIRS, "scenes_validation": 0, "scenes_test": 0, "shuffle_buffer": 16},
    "selection": {"strategy": "dissect", "options": {"variant": "momentum"}, "record": True},
    "evaluation": {"retrieval": False, "zero_shot": None, "noise_detection": False},
    "training": {
        "max_steps": STEPS,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "logging_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    },
}
EXPECTED_ERRORS = (CheckpointError, NonFiniteLossError, DataWorkerDied)


class Journal(TrainerCallback):
    """Tells through a pipe how far a run is: ["begin" | "step" | "saved", step]."""

    def __init__(self, pipe: int):
        self._pipe = pipe

    def note(self, what: str, value: object) -> None:
        os.write(self._pipe, (json.dumps([what, value]) + "\n").encode())

    def on_train_begin(self, args, state, control, **kwargs):
        self.note("begin", state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        self.note("step", state.global_step)

    def on_save(self, args, state, control, **kwargs):
        self.note("saved", state.global_step)


class Poison(TrainerCallback):
    """Makes the weights, or a loss, NaN in one step."""

    def __init__(self, trainer: DissectTrainer, step: int, generator: random.Random):
        self._step = step
        self._weight = generator.choice(list(trainer.model.parameters()))
        self._state = trainer.state
        self._strikes_weights = generator.random() < 0.5
        trainer.model.register_forward_hook(self._outputs)

    def on_train_begin(self, args, state, control, **kwargs):
        self._state = state

    def on_step_end(self, args, state, control, **kwargs):
        if self._strikes_weights and state.global_step == self._step:
            self._weight.data.view(-1)[0] = torch.nan

    def _outputs(self, model, inputs, outputs):
        if model.training and not self._strikes_weights and self._state.global_step == self._step - 1:
            outputs["image_embeds"] = outputs["image_embeds"] * torch.nan


@dataclass
class Setup:
    """A way of reading the data, and what an uninterrupted run with it leaves behind."""

    stream: bool
    workers: int
    ranks: int = 1
    splits: dict = field(default_factory=dict)
    reference: dict = field(default_factory=dict)
    step_seconds: float = 0.0
    checkpoint_bytes: int = 0

    def prepare(self, folder: Path) -> None:
        rows = shuffle_captions(make_scenes(PAIRS, image_size=32), rate=0.25)
        self.splits = {"train": rows.to_iterable_dataset(4) if self.stream else rows}
        run = Run(self, folder)
        run.wait_for(1)
        start = time.perf_counter()
        if run.end() != 0:
            raise SystemExit(f"The uninterrupted run failed: {run.last('error')}")
        self.step_seconds = (time.perf_counter() - start) / STEPS
        self.reference = left_behind(folder)
        self.checkpoint_bytes = sum(
            path.stat().st_size for path in (folder / f"checkpoint-{STEPS}").rglob("*") if path.is_file()
        )

    def trainer(self, folder: Path) -> DissectTrainer:
        torch.set_num_threads(1)
        data = RECIPE["data"] | {"streaming": self.stream, "num_workers": self.workers}
        training = RECIPE["training"] | {"output_dir": str(folder)}
        trainer = build_trainer(Recipe.from_dict(RECIPE | {"data": data, "training": training}), self.splits)
        trainer.args.save_run_folder = False
        return trainer


class Run:
    """A training in a forked process, or in one for each rank, and the journal of the first."""

    def __init__(self, setup: Setup, folder: Path, poison: tuple[int, int] | None = None):
        self.folder = folder
        self.lines: list[list] = []
        self._unread = b""
        self._pipe, end = os.pipe()
        os.set_blocking(self._pipe, False)
        fork = multiprocessing.get_context("fork")
        place = tempfile.mkdtemp(prefix="ranks-", dir=folder.parent)  # where the ranks meet
        self.processes = [
            fork.Process(target=_train, args=(setup, folder, end, poison, rank, place)) for rank in range(setup.ranks)
        ]
        self.process = self.processes[0]
        for process in self.processes:
            process.start()
        os.close(end)

    def read(self) -> None:
        try:
            while part := os.read(self._pipe, 65536):
                self._unread += part
        except BlockingIOError:
            pass
        *whole, self._unread = self._unread.split(b"\n")
        self.lines += map(json.loads, whole)

    def last(self, what: str) -> int | None:
        return next((value for kind, value in reversed(self.lines) if kind == what), None)

    def wait_for(self, step: int) -> bool:
        """Wait until the run has made `step` steps (0: has begun); whether it has."""
        while True:
            alive = self.process.is_alive()
            self.read()
            if (self.last("step") or self.last("begin") or 0) >= step and self.last("begin") is not None:
                return True
            if not alive:
                return False
            time.sleep(0.001)

    def end(self) -> int:
        """Wait for the end and return the exit status, negative for a signal."""
        for process in self.processes:
            process.join(120)
            if process.is_alive():
                process.kill()
                raise SystemExit(f"A run in {self.folder} did not end.")
        self.read()
        os.close(self._pipe)
        return self.process.exitcode


def _train(
    setup: Setup, folder: Path, pipe: int, poison: tuple[int, int] | None, rank: int = 0, place: str = ""
) -> None:
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    journal = Journal(pipe)
    if setup.ranks > 1:
        _join_ranks(setup.ranks, rank, place)
    try:
        trainer = setup.trainer(folder)
        if rank == 0:
            trainer.add_callback(journal)
        if poison is not None:
            step, seed = poison
            trainer.add_callback(Poison(trainer, step, random.Random(seed)))
        trainer.train(resume_from_checkpoint=find_last_checkpoint(folder))
    except StoppedBySignal:
        raise
    except Exception as error:
        journal.note("error", f"{type(error).__name__}: {error}")
        sys.exit(2 if isinstance(error, EXPECTED_ERRORS) else 1)


def _join_ranks(count: int, rank: int, place: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # not used: the ranks meet in a file
    store = f"file://{place}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=count, timeout=timedelta(minutes=1))


def left_behind(folder: Path) -> dict[str, object]:
    """All that a finished run left, without what depends on the clock."""
    last = folder / f"checkpoint-{STEPS}"
    log = json.loads((last / "trainer_state.json").read_text())["log_history"]
    state = json.loads((last / "dissect_state.json").read_text())
    optimizer = torch.load(last / "optimizer.pt", weights_only=True)["state"]
    return {
        # But for the checkpoint before the last ones: killed when these were there already, a run did not remove it.
        "files": sorted({path.name for path in folder.iterdir()} - {f"checkpoint-{n}" for n in range(STEPS)}),
        "weights": _content(last / "model.safetensors"),
        "optimiser": [[value.numpy().tobytes() for value in part.values()] for part in optimizer.values()],
        "ledger": {path.name: _content(path) for path in sorted(last.glob("ledger*.safetensors"))},
        "choices": pq.read_table(folder / "selection.parquet").to_pylist(),
        "logs": [{key: value for key, value in entry.items() if "time" not in key} for entry in log],
        "state": {**state, "parts": {name: part for name, part in state["parts"].items() if name != "times"}},
        "state tensors": _content(last / "dissect_state.safetensors"),
    }


def _content(path: Path) -> tuple[dict[str, str] | None, dict[str, bytes]]:
    """Metadata and tensors: safetensors writes the metadata in any order."""
    with safe_open(path, "np") as file:
        return file.metadata(), {name: file.get_tensor(name).tobytes() for name in sorted(file.keys())}
