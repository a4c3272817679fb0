"""What a checkpoint holds beside the Trainer's own files, so that a resumed run is the uninterrupted one."""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file

from hf_dissect.selection.ledger import LEDGER_FILE
from hf_dissect.training_data import num_pairs

if TYPE_CHECKING:
    from hf_dissect.resumable_trainer import ResumableTrainer
    from hf_dissect.training.trainer import DurableTrainer

logger = logging.getLogger(__name__)

STATE_FILE = "dissect_state.json"
TENSORS_FILE = "dissect_state.safetensors"


def save_run_state(trainer: "ResumableTrainer", folder: str | Path) -> None:
    """Write the state of the selection, of the data and of the logs; called on all ranks, written by the first."""
    everyone = trainer.ranks.gather_objects(
        {
            "bad_rows": trainer.bad_rows.state(),
            "stream": None if trainer.stream is None else trainer.stream.state_dict(),
            "loss_since_log": trainer.loss_since_log(),
            "decorrelation_since_log": trainer.objective.decorrelation.state(),
        }
    )
    if not trainer.args.should_save:
        return
    figures, tensors = trainer.monitor.state()
    state = {
        "processes": trainer.ranks.count,
        "candidates_per_update": candidates_per_update(trainer),
        "epoch": trainer.selection_epoch,
        "updated_epoch": trainer.updated_epoch,
        "times": trainer.times.so_far(),
        "monitor": figures,
        "ranks": everyone,
    }
    Path(folder, STATE_FILE).write_text(json.dumps(state), encoding="utf-8")
    save_file(tensors, Path(folder, TENSORS_FILE))


def read_run_state(folder: str | Path) -> dict[str, Any] | None:
    """The content of a checkpoint's state file; None without one."""
    path = Path(folder, STATE_FILE)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def restore_run_state(trainer: "ResumableTrainer", folder: str | Path) -> None:
    """Go on from what `save_run_state` wrote, as exactly as the number of processes allows."""
    ledger = Path(folder, LEDGER_FILE)
    if ledger.is_file():
        trainer.ledger.load(ledger)
    else:
        logger.warning("%s has no %s: the history of the pairs starts anew.", folder, LEDGER_FILE)
    state = read_run_state(folder)
    if state is None:
        logger.warning("%s has no %s: figures and logs of the selection start anew.", folder, STATE_FILE)
        return
    trainer.updated_epoch = state.get("updated_epoch", state["epoch"])
    trainer.enter_epoch(state["epoch"])
    if num_pairs(trainer.train_dataset) is None and trainer.stream is None:
        # Epochs of a foreign stream are counted as they begin, and this one begins again.
        trainer.selection_epoch -= 1
    trainer.times.add(state["times"])
    trainer.monitor.restore(state["monitor"], load_file(Path(folder, TENSORS_FILE)))
    ranks = state["ranks"]
    own = ranks[trainer.ranks.own % len(ranks)]
    if trainer.stream is not None and own["stream"] is not None:
        trainer.stream.load_state_dict(own["stream"])
    if len(ranks) == trainer.ranks.count:
        trainer.bad_rows.restore(own["bad_rows"])
        trainer.objective.decorrelation.restore(own["decorrelation_since_log"])
        trainer.restored_loss = own["loss_since_log"]
    else:
        trainer.bad_rows.restore(*(rank["bad_rows"] for rank in ranks))


def candidates_per_update(trainer: "DurableTrainer") -> int:
    """Candidates of all ranks that one optimiser step looks at."""
    args = trainer.args
    return args.train_batch_size * args.gradient_accumulation_steps * trainer.ranks.count


def moved_step(trainer: "DurableTrainer", state: dict[str, Any] | None, steps_per_epoch: int) -> int | None:
    """The step a run of epochs goes on at when a step looks at another number of candidates than it did before.

    Args:
        trainer: its `state` is the checkpoint's.
        state: of the checkpoint, see `read_run_state`.
        steps_per_epoch: optimiser steps of an epoch now.

    Returns:
        The step at the checkpoint's epoch; None when it need not move.
    """
    if state is None:
        return None
    before, now = state["candidates_per_update"], candidates_per_update(trainer)
    if state["processes"] != trainer.ranks.count:
        logger.warning(
            "The checkpoint was written by %d processes, this run has %d: the history of the pairs is kept and "
            "training goes on, statistically as the same run, not bit for bit.",
            *(state["processes"], trainer.ranks.count),
        )
    if before == now:
        return None
    if trainer.args.max_steps > 0:
        logger.warning(
            "A step looked at %d candidates and now looks at %d; max_steps counts steps, so training goes on at step "
            "%d.",
            *(before, now, trainer.state.global_step),
        )
        return None
    step = round(trainer.state.epoch * steps_per_epoch)
    logger.warning(
        "A step looked at %d candidates and now looks at %d: training goes on at the same epoch, %.2f, which is now "
        "step %d (it was step %d). The learning rate was meant for the other batch.",
        *(before, now, trainer.state.epoch, step, trainer.state.global_step),
    )
    return step
