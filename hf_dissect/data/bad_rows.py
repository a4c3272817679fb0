"""Count of the rows that cannot train, which stops the run when they are more than a few."""

import logging
from collections import Counter
from enum import IntEnum
from typing import Any

import torch

MIN_ROWS_TO_JUDGE = 1000
MIN_ROWS_IF_MOST_ARE_BAD = 100

logger = logging.getLogger(__name__)


class BadReason(IntEnum):
    """Reason why a row cannot train; `GOOD` when it can."""

    GOOD = 0
    IMAGE = 1
    CAPTION_MISSING = 2
    CAPTION_NOT_TEXT = 3

    @property
    def description(self) -> str:
        """Reason in words, for messages and reports."""
        return _DESCRIPTIONS[self]


_DESCRIPTIONS = {
    BadReason.GOOD: "good",
    BadReason.IMAGE: "image missing or undecodable",
    BadReason.CAPTION_MISSING: "caption missing or empty",
    BadReason.CAPTION_NOT_TEXT: "caption not a string",
}


class TooManyBadRows(RuntimeError):
    """Error for more unreadable rows than `max_bad_fraction` allows."""


class BadRows:
    """Bad rows by sample id; a row met again in the next epoch counts once.

    Args:
        max_fraction: Largest share of the pairs that may be bad.
        num_pairs: Number of pairs in the data set. None for a stream, which is judged by the rows it has given so
            far, once they are 1,000, or 100 when most of them are bad.
    """

    def __init__(self, max_fraction: float, num_pairs: int | None = None) -> None:
        self.max_fraction = max_fraction
        self.num_pairs = num_pairs
        self.reasons: dict[int, BadReason] = {}
        self._rows_seen = 0
        self._bad_seen = 0

    def __len__(self) -> int:
        return len(self.reasons)

    def add(self, sample_id: torch.Tensor, bad_reason: torch.Tensor) -> torch.Tensor:
        """Count a batch and return the positions of its good rows.

        Args:
            sample_id: Ids of the pairs, int64 `(B,)` on the CPU.
            bad_reason: Reason of each pair, int8 `(B,)` on the CPU, see `BadReason`.

        Returns:
            Positions, int64 `(number of good rows,)`.

        Raises:
            TooManyBadRows: The limit is passed; the message names ids and reasons.
        """
        self._rows_seen += len(sample_id)
        bad = bad_reason.nonzero().flatten()
        if len(bad):
            if not self.reasons:
                logger.warning("Skipping a pair that cannot be read (id %d); all are counted.", sample_id[bad[0]])
            for place in bad.tolist():
                self.reasons[int(sample_id[place])] = BadReason(int(bad_reason[place]))
            self._bad_seen += len(bad)
            self._check()
        return (bad_reason == 0).nonzero().flatten()

    def state(self) -> dict[str, Any]:
        """Return all counts as plain data, to continue from after a resume."""
        reasons = {str(sample_id): int(reason) for sample_id, reason in self.reasons.items()}
        return {"reasons": reasons, "rows_seen": self._rows_seen, "bad_seen": self._bad_seen}

    def restore(self, *states: dict[str, Any]) -> None:
        """Continue from what `state` returned, on this rank or on several, which are added up."""
        for state in states:
            self.reasons |= {int(sample_id): BadReason(reason) for sample_id, reason in state["reasons"].items()}
            self._rows_seen += state["rows_seen"]
            self._bad_seen += state["bad_seen"]

    def summary(self, max_ids: int = 1000) -> dict[str, Any]:
        """Return `count`, `reasons` (description to count) and the first `ids`, for `metrics.json`."""
        counts = Counter(reason.description for reason in self.reasons.values())
        return {"count": len(self), "reasons": dict(counts), "ids": sorted(self.reasons)[:max_ids]}

    def _check(self) -> None:
        # The length of a stream is unknown: there, rows count as often as they are seen, good and bad alike.
        bad, judged = (self._bad_seen, self._rows_seen) if self.num_pairs is None else (len(self), self.num_pairs)
        if self.num_pairs is None:
            enough = MIN_ROWS_IF_MOST_ARE_BAD if 2 * bad > judged else MIN_ROWS_TO_JUDGE
            if judged < enough:
                return
        if bad > self.max_fraction * judged:
            summary = self.summary(max_ids=10)
            reasons = ", ".join(f"{count} x {reason}" for reason, count in summary["reasons"].items())
            raise TooManyBadRows(
                f"{bad} of {judged} pairs cannot be read ({reasons}), more than max_bad_fraction="
                f"{self.max_fraction:g} allows. First sample ids: {', '.join(map(str, summary['ids']))}. "
                "Mend the data, check the column names, or raise max_bad_fraction."
            )
