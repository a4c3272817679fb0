"""Running figures of a distillation, and warnings when the teacher or the discriminator fails."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hf_dissect.data.bad_rows import MOST_PROBLEMS, TooManyBadRows
from hf_dissect.data.problems import describe_problem, list_problems
from hf_dissect.distillation.data_collator import RowState
from hf_dissect.distributed import Ranks

logger = logging.getLogger(__name__)

LOGS_TO_SATURATE = 3
"""Number of consecutive logs with a high accuracy after which the discriminator counts as saturated."""


class Meter:
    """Means of figures since the last log, over steps and ranks."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}  # float64 (2,): sum and count

    def add(self, name: str, value: torch.Tensor, count: torch.Tensor | int = 1) -> None:
        """Add a figure.

        Args:
            name: Name of the figure.
            value: Scalar, or a sum of `count` numbers; it is ignored if it is not finite.
            count: Number of summands.
        """
        value = value.detach().double()
        part = torch.stack([value, torch.as_tensor(count, dtype=torch.float64, device=value.device)])
        part = torch.where(value.isfinite(), part, 0)
        self._sums[name] = part if name not in self._sums else self._sums[name].to(part.device) + part

    def pop(self, ranks: Ranks) -> dict[str, float]:
        """Return the means and reset the meter; called on all ranks."""
        if not self._sums:
            return {}
        names, everywhere = list(self._sums), ranks.gather(torch.stack(list(self._sums.values()))[None]).sum(0)
        self.reset()
        return {name: float(total / count) for name, (total, count) in zip(names, everywhere, strict=True) if count}

    def reset(self) -> None:
        """Discard all figures."""
        self._sums = {}

    def state_dict(self) -> dict[str, list[float]]:
        """Return sum and count of each figure since the last log."""
        return {name: sums.tolist() for name, sums in self._sums.items()}

    def load_state_dict(self, state: Mapping[str, list[float]]) -> None:
        """Continue from a saved state."""
        self._sums = {name: torch.tensor(sums, dtype=torch.float64) for name, sums in state.items()}


class RowCounts:
    """Rows that lack something, by row number; a row met again in the next epoch counts once.

    Args:
        max_bad_fraction: Largest share of rows that cannot train anything.
        num_rows: Number of rows of the training data.

    Attributes:
        states: State of each row that lacks something, by row number.
        problems: Problems of the first rows whose values cannot be used, by row number, as in a batch.
    """

    def __init__(self, max_bad_fraction: float, num_rows: int) -> None:
        self.max_bad_fraction = max_bad_fraction
        self.num_rows = num_rows
        self.states: dict[int, RowState] = {}
        self.problems: dict[int, str] = {}
        self._warned: set[RowState] = set()

    def add(self, row: torch.Tensor, row_state: torch.Tensor, problems: Mapping[int, str] | None = None) -> None:
        """Count the rows of a batch, and warn of the first row of each kind whose values cannot be used.

        Args:
            row: Row numbers, int64 `(B,)` on the CPU.
            row_state: States of the rows, int8 `(B,)` on the CPU.
            problems: Problems of rows by position, as `read_problems` returns them.

        Raises:
            TooManyBadRows: More rows are unusable than `max_bad_fraction` allows.
        """
        lacking = row_state.nonzero().flatten().tolist()
        for place in lacking:
            self._note(int(row[place]), RowState(int(row_state[place])), (problems or {}).get(place, ""))
        if lacking:
            self._check()

    def _note(self, row: int, state: RowState, problem: str) -> None:
        self.states[row] = state
        if not problem:
            return
        if len(self.problems) < MOST_PROBLEMS:
            self.problems[row] = problem
        if state not in self._warned:
            self._warned.add(state)
            logger.warning(
                "Row %d cannot be used as a whole (%s: %s); all such rows are counted.",
                *(row, state.description, describe_problem(problem)),
            )

    def summary(self, max_rows: int = 1000) -> dict[str, Any]:
        """Return the counts for `metrics.json`.

        Args:
            max_rows: Largest number of row numbers in the result.

        Returns:
            Numbers of rows that were `complete`, `unlabelled`, `student_only` and `unusable`; `reasons`, the number of
            rows by description of their state; `rows`, the first row numbers that lack something; and, if they are
            known, `problems`: `id` (the row number), `problem` and `path` of the first rows that cannot be used as a
            whole.
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
            **({"problems": list_problems(self.problems)} if self.problems else {}),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the rows that lack something, and the problems."""
        return {
            "states": {str(row): int(state) for row, state in self.states.items()},
            "problems": {str(row): problem for row, problem in self.problems.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
        states, problems = _split_state(state)
        self.states = {int(row): RowState(value) for row, value in states.items()}
        self.problems = {int(row): problem for row, problem in problems.items()}
        self._warned = {self.states[row] for row in self.problems if row in self.states}

    @staticmethod
    def join_states(states: Sequence[Mapping[str, Any]], rank: int = 0) -> dict[str, Any]:
        """Join the states of several ranks, for a run that continues with another number of them.

        Args:
            states: States of each rank.
            rank: Number of the rank that continues; all continue from the same.
        """
        parts = [_split_state(state) for state in states]
        return {
            "states": {row: value for part, _ in parts for row, value in part.items()},
            "problems": {row: problem for _, part in parts for row, problem in part.items()},
        }

    def _check(self) -> None:
        bad = {row: state for row, state in self.states.items() if not state.usable}
        if len(bad) > self.max_bad_fraction * self.num_rows:
            counts = Counter(state.description for state in bad.values())
            reasons = ", ".join(f"{count} x {reason}" for reason, count in counts.items())
            known = [f"{describe_problem(self.problems[row])} (row {row})" for row in bad if row in self.problems][:3]
            first = f"First problems: {'; '.join(known)}. " if known else ""
            raise TooManyBadRows(
                f"{len(bad)} of {self.num_rows} rows cannot be used ({reasons}), more than max_bad_fraction="
                f"{self.max_bad_fraction:g} allows. First rows: {', '.join(map(str, sorted(bad)[:10]))}. "
                f"{first}Mend the data, check the column names, "
                "or raise max_bad_fraction."
            )


def _split_state(state: Mapping[str, Any]) -> tuple[Mapping[str, int], Mapping[str, str]]:
    """Return states and problems; the state of an earlier version has the states alone, by row number."""
    return (state["states"], state["problems"]) if "states" in state else (state, {})


class Watch:
    """Monitor that warns, once each, when the teacher weakens or the discriminator saturates.

    Args:
        teacher_drop: Fall of the teacher's accuracy below its best, in (0, 1), that causes a warning.
        discriminator_ceiling: Accuracy of the discriminator, in (0.5, 1], above which it saturates; the warning comes
            after `LOGS_TO_SATURATE` such logs in a row.

    Attributes:
        best: Best accuracy of the teacher, by the name of the figure.
        saturated: Number of consecutive logs above the ceiling.
        warned: Subjects of the warnings so far, "teacher" and "discriminator".
        texts: Texts of the warnings of this process, by subject.
    """

    def __init__(self, teacher_drop: float, discriminator_ceiling: float) -> None:
        self.teacher_drop = teacher_drop
        self.discriminator_ceiling = discriminator_ceiling
        self.best: dict[str, float] = {}
        self.saturated = 0
        self.warned: list[str] = []
        self.texts: dict[str, str] = {}

    def check(self, figures: Mapping[str, float]) -> None:
        """Check the figures of a log or of an evaluation and warn where they show a failure.

        Args:
            figures: Figures by name; those of an evaluation have a prefix such as `eval_`.
        """
        for name in [name for name in figures if name.endswith("teacher_accuracy")]:
            self._check_teacher(name, figures[name])
        if "discriminator_accuracy" in figures:
            self._check_discriminator(figures["discriminator_accuracy"])

    def state_dict(self) -> dict[str, Any]:
        """Return best accuracies, number of saturated logs, and warnings so far."""
        return {"best": self.best, "saturated": self.saturated, "warned": self.warned}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
        self.best, self.saturated, self.warned = dict(state["best"]), state["saturated"], list(state["warned"])

    def _check_teacher(self, name: str, accuracy: float) -> None:
        best = self.best.get(name, 0.0)
        self.best[name] = max(accuracy, best)
        if accuracy < best - self.teacher_drop:
            self._warn(
                "teacher",
                f"The teacher weakens: its accuracy ({name}) fell from {best:.3f} to {accuracy:.3f}. A weaker teacher "
                "is an easy way to raise I(T;S). Raise term_weights.information_auxiliary or teacher_task, lower "
                "information_student, or set teacher_learns to false.",
            )

    def _check_discriminator(self, accuracy: float) -> None:
        self.saturated = self.saturated + 1 if accuracy > self.discriminator_ceiling else 0
        if self.saturated >= LOGS_TO_SATURATE:
            self._warn(
                "discriminator",
                f"The discriminator saturates (accuracy {accuracy:.3f}): the student learns little from it. Lower "
                "discriminator_learning_rate or discriminator_size, or the weight of conditional_entropy.",
            )

    def _warn(self, subject: str, text: str) -> None:
        if subject not in self.warned:
            self.warned.append(subject)
            self.texts[subject] = text
            logger.warning(text)
