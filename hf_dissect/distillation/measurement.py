"""Measurement of the criterion before and after the training of a run, kept for its checkpoints, report and card."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_dissect.distillation.criterion import Criterion, RowPart, hold_out, measure_criterion
from hf_dissect.distillation.data_collator import DistillationCollator
from hf_dissect.distillation.information import FEWEST_ROWS
from hf_dissect.distillation.networks import DistillationNetworks
from hf_dissect.distillation.training_args import DistillationTrainingArguments
from hf_dissect.distillation.training_data import Columns, ModalityRows, list_columns
from hf_dissect.distributed import Ranks
from hf_dissect.training.time_spent import TimeSpent

logger = logging.getLogger(__name__)

_LOGGED = (
    *("student_label", "teacher_label", "auxiliaries_label", "gain"),
    *("information_bound", "information_cap", "information_uncapped"),
)


class Measurement(TrainerCallback):
    """Callback that measures the criterion before the first step; the trainer measures it once more at the end.

    Held-out rows are those of the evaluation if they have labels and auxiliaries, else a fifth of the training rows,
    by group if there are groups. The networks train on that fifth all the same; only the estimators do without it.
    Each rank measures all rows, so that none waits for another, and all keep what the first one found.

    Args:
        args: Arguments of the run.
        networks: Networks that train.
        collator: Collator of their rows.
        rows: Training rows; rows of the evaluation, or None; and the group of each training row, or None.
        ranks: Processes of the run.
        times: Seconds of the parts of the run.
        log: Function that logs figures.

    Attributes:
        measured: Criterion by time, "before" and "after"; "choice" is that of the pilot of method auto.
    """

    def __init__(
        self,
        args: DistillationTrainingArguments,
        networks: DistillationNetworks,
        collator: DistillationCollator,
        rows: tuple[ModalityRows, ModalityRows | None, Sequence[Any] | None],
        ranks: Ranks,
        times: TimeSpent,
        log: Callable[[dict[str, float]], None],
    ) -> None:
        self._wanted = args.measure_information and networks.teacher is not None
        self._batch_size = args.eval_batch_size
        self._networks, self._collator = networks, collator
        self._train, self._evaluation, self._groups = rows
        self._ranks, self._times, self._log = ranks, times, log
        self.measured: dict[str, Criterion] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the initial networks, unless the run is resumed."""
        if state.global_step == 0:
            self.measure("before")

    def measure(self, when: str) -> None:
        """Measure the networks as they are, if that is wanted; every rank calls this method.

        Args:
            when: Time of the measurement, "before" or "after".
        """
        if not self._wanted:
            return
        with self._times.measure("evaluation"):
            # An error must neither end the run nor leave the other ranks waiting.
            try:
                criterion = self._compute()
            except Exception as error:
                logger.warning("What the teacher knows could not be measured %s training: %r", when, error)
                criterion = None
            criterion = self._ranks.gather_objects(criterion)[0]
        if criterion is None:
            return
        self.measured[when] = criterion
        logger.info("%s training: %s", when.capitalize(), criterion.sentence)
        figures = {name: getattr(criterion, name) for name in _LOGGED}
        self._log({f"criterion_{name}": value for name, value in figures.items() if value is not None})

    def describe(self) -> dict[str, Any]:
        """Return the content of `metrics.json`; an empty mapping if nothing was measured."""
        return {when: criterion.to_dict() for when, criterion in self.measured.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return what was measured so far."""
        return self.describe()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
        self.measured = {when: Criterion.from_dict(saved) for when, saved in state.items()}

    def _compute(self) -> Criterion:
        evaluation = self._evaluation
        if evaluation is not None and evaluation.modalities == self._train.modalities:
            every = RowPart(evaluation, range(len(evaluation)))
            criterion = self._compare(range(len(self._train)), every, f"{len(evaluation)} validation rows")
            labelled = sum(number >= 0 for number in evaluation.label_numbers)
            if min(labelled, criterion.held_out_rows) >= FEWEST_ROWS:
                return criterion
        own, held_out = hold_out(self._train.label_numbers, self._groups)
        described = f"{len(held_out)} training rows, on which the networks train as well"
        return self._compare(own, RowPart(self._train, held_out), described)

    def _compare(self, own: Sequence[int], held_out: RowPart, described: str) -> Criterion:
        return measure_criterion(
            self._networks,
            self._collator,
            RowPart(self._train, own),
            held_out,
            described=described,
            batch_size=self._batch_size,
        )


def read_groups(recipe: Any, columns: Columns) -> Sequence[Any] | None:
    """Return the group of each row by `data.group_column` of the recipe; None without such a column."""
    name = None if recipe is None else recipe.data.group_column
    return columns[name] if name is not None and name in list_columns(columns) else None
