"""What a checkpoint of a distillation holds beside the Trainer's files, so that a resumed run is the same run."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file, save_file

from hf_dissect.distillation.losses.mutual_information import MemoryBank
from hf_dissect.training.run_state import STATE_FILE, candidates_per_update, read_run_state

if TYPE_CHECKING:
    from hf_dissect.distillation.trainer import AuxiliaryDistillationTrainer

TENSORS_FILE = "distillation_state.safetensors"


def save_distillation_state(trainer: "AuxiliaryDistillationTrainer", folder: str | Path) -> None:
    """Write discriminator, its moments, memory banks, counts and logs; called on all ranks, written by the first."""
    everyone = trainer.ranks.gather_objects(
        {"rows": trainer.rows.state(), "meter": trainer.meter.state(), "loss_since_log": trainer.loss_since_log()}
    )
    if not trainer.args.should_save:
        return
    state = {
        "processes": trainer.ranks.count,
        "candidates_per_update": candidates_per_update(trainer),
        "times": trainer.times.so_far(),
        "watch": trainer.watch.state(),
        "ranks": everyone,
    }
    Path(folder, STATE_FILE).write_text(json.dumps(state), encoding="utf-8")
    tensors = {} if trainer.adversary is None else {f"adversary/{k}": v for k, v in trainer.adversary.state().items()}
    banks = trainer.objective.banks.items()
    tensors |= {f"bank/{name}": bank.vectors.cpu() for name, bank in banks if bank.vectors is not None}
    save_file(tensors, Path(folder, TENSORS_FILE))


def restore_distillation_state(trainer: "AuxiliaryDistillationTrainer", folder: str | Path) -> None:
    """Go on from what `save_distillation_state` wrote, as exactly as the number of processes allows.

    Raises:
        ValueError: the files are missing.
    """
    state = read_run_state(folder)
    if state is None or not Path(folder, TENSORS_FILE).is_file():
        raise ValueError(f"{folder} has no {STATE_FILE} and {TENSORS_FILE}; resume from another checkpoint.")
    tensors = load_file(Path(folder, TENSORS_FILE))
    if trainer.adversary is not None:
        prefix = "adversary/"
        trainer.adversary.restore({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    for name, vectors in tensors.items():
        if name.startswith("bank/") and trainer.args.memory_bank:
            bank = trainer.objective.banks.setdefault(name.removeprefix("bank/"), MemoryBank(trainer.args.memory_bank))
            bank.vectors = vectors.to(trainer.args.device)
    trainer.times.add(state["times"])
    trainer.watch.restore(state["watch"])
    ranks = state["ranks"]
    if len(ranks) == trainer.ranks.count:
        own = ranks[trainer.ranks.own]
        trainer.rows.restore(own["rows"])
        trainer.meter.restore(own["meter"], trainer.args.device)
        trainer.restored_loss = own["loss_since_log"]
    else:
        trainer.rows.restore(*(rank["rows"] for rank in ranks))
