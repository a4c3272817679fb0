"""A Trainer whose selection goes on, when a run is resumed, as if it had not been ended."""

from pathlib import Path

from hf_dissect.data.tasks import save_task_names
from hf_dissect.models.adapters import restore_base, save_base
from hf_dissect.selection.ledger import LEDGER_FILE
from hf_dissect.training.run_state import restore_run_state, save_run_state
from hf_dissect.training.trainer import DurableTrainer
from hf_dissect.training_data import num_pairs


class ResumableTrainer(DurableTrainer):
    """Keeps the state of the selection with each checkpoint, and what an adapter needs to be loaded.

    The checkpoint is the Trainer's, with `ledger.safetensors`, `recipe.yaml` and the state of selection, data and logs
    (`run_state`) beside its files. The attributes it saves are made by `DissectTrainer`.
    """

    def __init__(self, *arguments, **keywords):
        self.stream = None  # a `StreamLoader` when the training data are a stream
        self.selection_epoch = 0  # as strategies count
        self.updated_epoch = 0  # the last one for which strategy and objective renewed what holds for an epoch
        super().__init__(*arguments, **keywords)

    def train(self, resume_from_checkpoint: str | bool | None = None, **arguments):
        """Train as `DurableTrainer` does, with the epochs of the selection counted from the beginning."""
        self.selection_epoch, self.updated_epoch = -1, 0
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **arguments)

    def enter_epoch(self, epoch: int) -> None:
        """Begin an epoch, or go on in its middle: what holds for an epoch is renewed when it begins, and then only."""
        self.selection_epoch = epoch
        if epoch > self.updated_epoch:
            self.updated_epoch = epoch
            self.strategy.update(self.ledger)
            self.objective.update(self.ledger)
        self.strategy.on_epoch_begin(epoch, self.ledger)
        self.objective.on_epoch_begin(epoch)

    def begin_epoch(self, epoch: float) -> None:
        """Enter the epoch; of a stream, of which the Trainer sees one epoch, passes are told by the loader."""
        if self.stream is None:
            is_counted = num_pairs(self.train_dataset) is None
            self.enter_epoch(self.selection_epoch + 1 if is_counted else int(epoch + 1e-6))

    def begin_anew(self, step: int) -> None:
        """Record candidates from `step` on."""
        self.trace.restart(step)

    def write_beside_model(self, folder: Path) -> None:
        """Write the ledger, the recipe, and what an adapter needs to be loaded."""
        self.ledger.save(folder / LEDGER_FILE, {"epoch": self.selection_epoch, "strategy": self.strategy.name})
        super().write_beside_model(folder)
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):  # whose processes each hold a part only
            save_base(self.model, folder)
        save_task_names(self.train_dataset, folder)

    def save_state(self, folder: Path) -> None:
        """Write the state of selection, data and logs."""
        self.trace.flush()
        save_run_state(self, folder)

    def restore_state(self, folder: str) -> None:
        """Go on from the state of selection, data and logs."""
        restore_run_state(self, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        restore_base(self.model, resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self):
        restore_base(self.model, self.state.best_model_checkpoint)
        super()._load_best_model()
