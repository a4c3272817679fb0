"""Count of the rows that cannot train, which stops the run when they are more than a few."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any

import torch

from hf_dissect.data.problems import describe_problem, list_problems

MIN_ROWS_TO_JUDGE = 1000
MIN_ROWS_IF_MOST_ARE_BAD = 100
FIRST_PICTURES = 8
"""Number of rows of a stream after which the run stops if the picture of none could be read."""
MOST_PROBLEMS = 100
"""Number of bad rows whose problem is kept; of the others, the reason."""

logger = logging.getLogger(__name__)


class BadReason(IntEnum):
    """Reason why a row cannot train; `GOOD` when it can."""

    GOOD = 0
    IMAGE = 1
    CAPTION_MISSING = 2
    CAPTION_NOT_TEXT = 3
    CAPTION_NOT_UNICODE = 4
    WEIGHT = 5

    @property
    def description(self) -> str:
        """Reason in words, for messages and reports."""
        return _DESCRIPTIONS[self]

    def describe(self, problem: str = "") -> str:
        """Return the reason with the problem of a row, as in a batch: "image missing ...: no such file: 7.jpg"."""
        return f"{self.description}: {describe_problem(problem)}" if problem else self.description


_DESCRIPTIONS = {
    BadReason.GOOD: "good",
    BadReason.IMAGE: "image missing or undecodable",
    BadReason.CAPTION_MISSING: "caption missing or empty",
    BadReason.CAPTION_NOT_TEXT: "caption not a string",
    BadReason.CAPTION_NOT_UNICODE: "caption cannot be encoded",
    BadReason.WEIGHT: "weight missing or not a number of at least 0",
}


class TooManyBadRows(RuntimeError):
    """Error for more unreadable rows than `max_bad_fraction` allows."""


class BadRows:
    """Bad rows by sample id; a row met again in the next epoch counts once.

    Args:
        max_fraction: Largest share of the pairs that may be bad.
        num_pairs: Number of pairs in the data set. None for a stream, which is judged by the rows it has given so
            far, once they are 1,000, or 100 when most of them are bad, or 8 if no picture could be read.

    Attributes:
        reasons: Reason of each bad row, by sample id.
        problems: Problems of the first bad rows by sample id, as in a batch (see `hf_dissect.data.problems`).
    """

    def __init__(self, max_fraction: float, num_pairs: int | None = None) -> None:
        self.max_fraction = max_fraction
        self.num_pairs = num_pairs
        self.reasons: dict[int, BadReason] = {}
        self.problems: dict[int, str] = {}
        self._warned: set[BadReason] = set()
        self._rows_seen = 0
        self._bad_seen = 0

    def __len__(self) -> int:
        return len(self.reasons)

    def add(
        self, sample_id: torch.Tensor, bad_reason: torch.Tensor, problems: Mapping[int, str] | None = None
    ) -> torch.Tensor:
        """Count a batch and return the positions of its good rows.

        Args:
            sample_id: Ids of the pairs, int64 `(B,)` on the CPU.
            bad_reason: Reason of each pair, int8 `(B,)` on the CPU, see `BadReason`.
            problems: Problems of bad rows by position, as `read_problems` returns them.

        Returns:
            Positions, int64 `(number of good rows,)`.

        Raises:
            TooManyBadRows: The limit is passed; the message names ids, reasons and the first problems.
        """
        self._rows_seen += len(sample_id)
        bad = bad_reason.nonzero().flatten()
        if len(bad):
            for place in bad.tolist():
                self._note(int(sample_id[place]), BadReason(int(bad_reason[place])), (problems or {}).get(place, ""))
            self._bad_seen += len(bad)
            self._check()
        return (bad_reason == 0).nonzero().flatten()

    def state_dict(self) -> dict[str, Any]:
        """Return all counts."""
        reasons = {str(sample_id): int(reason) for sample_id, reason in self.reasons.items()}
        problems = {str(sample_id): problem for sample_id, problem in self.problems.items()}
        return {
            "reasons": reasons,
            "problems": problems,
            "rows_seen": self._rows_seen,
            "bad_seen": self._bad_seen,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from saved counts."""
        self.reasons = {int(sample_id): BadReason(reason) for sample_id, reason in state["reasons"].items()}
        self._warned = set(self.reasons.values())
        # A state of an earlier version has no problems.
        self.problems = {int(sample_id): problem for sample_id, problem in state.get("problems", {}).items()}
        self._rows_seen = state["rows_seen"]
        self._bad_seen = state["bad_seen"]

    @staticmethod
    def join_states(states: Sequence[Mapping[str, Any]], rank: int = 0) -> dict[str, Any]:
        """Add up the counts of several ranks, for a run that continues with another number of them.

        Args:
            states: Counts of each rank.
            rank: Number of the rank that continues; all continue from the same.
        """
        return {
            "reasons": {sample_id: reason for state in states for sample_id, reason in state["reasons"].items()},
            "problems": {id_: problem for state in states for id_, problem in state.get("problems", {}).items()},
            "rows_seen": sum(state["rows_seen"] for state in states),
            "bad_seen": sum(state["bad_seen"] for state in states),
        }

    def summary(self, max_ids: int = 1000) -> dict[str, Any]:
        """Return the counts for `metrics.json`.

        Args:
            max_ids: Largest number of ids in the result.

        Returns:
            `count`; `reasons`, description to count; the first `ids`; and, if they are known, `problems`: `id`,
            `problem` and `path` (or key) of the first bad rows.
        """
        counts = Counter(reason.description for reason in self.reasons.values())
        summary = {"count": len(self), "reasons": dict(counts), "ids": sorted(self.reasons)[:max_ids]}
        if self.problems:
            summary["problems"] = list_problems(self.problems)
        return summary

    def count_judged(self) -> tuple[int, int]:
        """Return the number of bad rows and of the rows that they are among; (0, 0) for too few rows of a stream."""
        bad, judged = self._count()
        return (bad, judged) if self.num_pairs is not None or judged >= _count_enough(bad, judged) else (0, 0)

    def _count(self) -> tuple[int, int]:
        # The length of a stream is unknown: there, rows count as often as they are seen, good and bad alike.
        return (self._bad_seen, self._rows_seen) if self.num_pairs is None else (len(self), self.num_pairs)

    def _note(self, sample_id: int, reason: BadReason, problem: str) -> None:
        if reason not in self._warned:
            self._warned.add(reason)
            logger.warning(
                "Skipping a pair that cannot be read (id %d: %s); all are counted.",
                *(sample_id, reason.describe(problem)),
            )
        self.reasons[sample_id] = reason
        if problem and len(self.problems) < MOST_PROBLEMS:
            self.problems[sample_id] = problem

    def _check(self) -> None:
        bad, judged = self._count()
        if self.num_pairs is None:
            if bad == judged >= FIRST_PICTURES and set(self.reasons.values()) == {BadReason.IMAGE}:
                raise TooManyBadRows(
                    f"None of the first {judged} pictures of the stream can be read. {self._list_first()}"
                    "Mend the data, or name the column of the pictures (image_column)."
                )
            if judged < _count_enough(bad, judged):
                return
        if bad > self.max_fraction * judged:
            summary = self.summary(max_ids=10)
            reasons = ", ".join(f"{count} x {reason}" for reason, count in summary["reasons"].items())
            raise TooManyBadRows(
                f"{bad} of {judged} pairs cannot be read ({reasons}), more than max_bad_fraction="
                f"{self.max_fraction:g} allows. First sample ids: {', '.join(map(str, summary['ids']))}. "
                f"{self._list_first()}Mend the data, check the column names, or raise max_bad_fraction."
            )

    def _list_first(self, count: int = 3) -> str:
        """Return the first problems in words, empty without any."""
        first = [f"{describe_problem(problem)} (id {id_})" for id_, problem in list(self.problems.items())[:count]]
        return f"First problems: {'; '.join(first)}. " if first else ""


def _count_enough(bad: int, judged: int) -> int:
    """Return the number of rows of a stream that are enough to judge it by."""
    return MIN_ROWS_IF_MOST_ARE_BAD if 2 * bad > judged else MIN_ROWS_TO_JUDGE
