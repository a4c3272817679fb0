"""Figures of a run as it goes, and warnings when teacher or discriminator go astray."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hf_dissect.data.bad_rows import TooManyBadRows
from hf_dissect.distillation.data_collator import RowState
from hf_dissect.distributed import Ranks

logger = logging.getLogger(__name__)

LOGS_TO_SATURATE = 3


class Meter:
    """Means of figures since the last log, over steps and ranks."""

    def __init__(self):
        self._sums: dict[str, torch.Tensor] = {}  # float64 (2,): sum and count

    def add(self, name: str, value: torch.Tensor, count: torch.Tensor | int = 1) -> None:
        """Take in a scalar, or a sum and its count; a value that is not finite does not count."""
        value = value.detach().double()
        part = torch.stack([value, torch.as_tensor(count, dtype=torch.float64, device=value.device)])
        part = torch.where(value.isfinite(), part, 0)
        self._sums[name] = part if name not in self._sums else self._sums[name].to(part.device) + part

    def pop(self, ranks: Ranks) -> dict[str, float]:
        """The means, and begin anew; called on all ranks."""
        if not self._sums:
            return {}
        names, everywhere = list(self._sums), ranks.gather(torch.stack(list(self._sums.values()))[None]).sum(0)
        self._sums = {}
        return {name: float(total / count) for name, (total, count) in zip(names, everywhere, strict=True) if count}

    def reset(self) -> None:
        """Discard what was counted."""
        self._sums = {}

    def state_dict(self) -> dict[str, list[float]]:
        """Return what was counted since the last log."""
        return {name: sums.tolist() for name, sums in self._sums.items()}

    def load_state_dict(self, state: Mapping[str, list[float]]) -> None:
        """Continue from a saved state."""
        self._sums = {name: torch.tensor(sums, dtype=torch.float64) for name, sums in state.items()}


class RowCounts:
    """The rows that lack something, by row number; a row met again in the next epoch counts once.

    Args:
        max_bad_fraction: largest share of rows that cannot train anything.
        num_rows: of the training data.
    """

    def __init__(self, max_bad_fraction: float, num_rows: int):
        self.max_bad_fraction = max_bad_fraction
        self.num_rows = num_rows
        self.states: dict[int, RowState] = {}

    def add(self, row: torch.Tensor, row_state: torch.Tensor) -> None:
        """Take in a batch.

        Raises:
            TooManyBadRows: too many rows cannot be used.
        """
        lacking = row_state.nonzero().flatten().tolist()
        for place in lacking:
            self.states[int(row[place])] = RowState(int(row_state[place]))
        if lacking:
            self._check()

    def summary(self, max_rows: int = 1000) -> dict:
        """For `metrics.json`: how many rows were `complete`, `unlabelled`, `student_only`, `unusable`, for which
        `reasons`, and the first `rows` that lack something.
        """
        reasons = Counter(state.description for state in self.states.values())
        unlabelled = sum(state == RowState.LABEL_MISSING for state in self.states.values())
        unusable = sum(not state.usable for state in self.states.values())
        return {
            "complete": self.num_rows - len(self.states),
            "unlabelled": unlabelled,
            "student_only": len(self.states) - unlabelled - unusable,
            "unusable": unusable,
            "reasons": dict(reasons),
            "rows": sorted(self.states)[:max_rows],
        }

    def state_dict(self) -> dict[str, int]:
        """Return the states of the rows that lack something."""
        return {str(row): int(state) for row, state in self.states.items()}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue from saved states."""
        self.states = {int(row): RowState(value) for row, value in state.items()}

    @staticmethod
    def join_states(states: Sequence[Mapping[str, int]], rank: int = 0) -> dict[str, int]:
        """Join the states of several ranks, for a run that continues with another number of them.

        Args:
            states: States of each rank.
            rank: Number of the rank that continues; all continue from the same.
        """
        return {row: value for state in states for row, value in state.items()}

    def _check(self) -> None:
        bad = {row: state for row, state in self.states.items() if not state.usable}
        if len(bad) > self.max_bad_fraction * self.num_rows:
            reasons = Counter(state.description for state in bad.values())
            told = ", ".join(f"{count} x {reason}" for reason, count in reasons.items())
            raise TooManyBadRows(
                f"{len(bad)} of {self.num_rows} rows cannot be used ({told}), more than max_bad_fraction="
                f"{self.max_bad_fraction:g} allows. First rows: {', '.join(map(str, sorted(bad)[:10]))}. Mend the "
                "data, check the column names, or raise max_bad_fraction."
            )


class Watch:
    """Warns, once each, of the two ways in which the distillation is known to fail.

    Args:
        teacher_drop: fall of the teacher's accuracy below its best that is told.
        discriminator_ceiling: accuracy above which, three logs in a row, the discriminator is said to saturate.
    """

    def __init__(self, teacher_drop: float, discriminator_ceiling: float):
        self.teacher_drop = teacher_drop
        self.discriminator_ceiling = discriminator_ceiling
        self.best: dict[str, float] = {}  # of the teacher, by the prefix of its figure
        self.saturated = 0
        self.warned: list[str] = []

    def look(self, figures: dict[str, float]) -> None:
        """Look at the figures of a log or of an evaluation (with a prefix such as `eval_`)."""
        for name in [name for name in figures if name.endswith("teacher_accuracy")]:
            accuracy, best = figures[name], self.best.get(name, 0.0)
            self.best[name] = max(accuracy, best)
            if accuracy < best - self.teacher_drop:
                self._warn(
                    "teacher",
                    f"The teacher weakens: its accuracy ({name}) fell from {best:.3f} to {accuracy:.3f}. Maximising "
                    "I(T;S) has this short cut. Raise term_weights.information_auxiliary or teacher_task, lower "
                    "information_student, or set teacher_learns to false.",
                )
        if (accuracy := figures.get("discriminator_accuracy")) is not None:
            self.saturated = self.saturated + 1 if accuracy > self.discriminator_ceiling else 0
            if self.saturated >= LOGS_TO_SATURATE:
                self._warn(
                    "discriminator",
                    f"The discriminator saturates (accuracy {accuracy:.3f}): the student learns little from it. Lower "
                    "discriminator_learning_rate or discriminator_size, or the weight of conditional_entropy.",
                )

    def state_dict(self) -> dict[str, Any]:
        """Return best accuracies, the count of saturated logs, and the warnings given."""
        return {"best": self.best, "saturated": self.saturated, "warned": self.warned}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
        self.best, self.saturated, self.warned = dict(state["best"]), state["saturated"], list(state["warned"])

    def _warn(self, key: str, text: str) -> None:
        if key not in self.warned:
            self.warned.append(key)
            logger.warning(text)
