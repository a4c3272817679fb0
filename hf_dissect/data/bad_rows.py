"""Counts the rows that cannot train, and stops the run when they are no longer a few."""

import logging
from collections import Counter

import torch

from hf_dissect.data_collator import BadReason

MIN_ROWS_TO_JUDGE = 1000
MIN_ROWS_IF_MOST_ARE_BAD = 100

logger = logging.getLogger(__name__)


class TooManyBadRows(RuntimeError):
    """More rows than `max_bad_fraction` allows could not be read."""


class BadRows:
    """Bad rows by sample id; a row met again in the next epoch counts once.

    Args:
        max_fraction: largest share of the pairs that may be bad.
        num_pairs: pairs in the data set, None for a stream, which is judged by what it has shown once that is
            1,000 rows, or 100 when most of them are bad.
    """

    def __init__(self, max_fraction: float, num_pairs: int | None = None):
        self.max_fraction = max_fraction
        self.num_pairs = num_pairs
        self.reasons: dict[int, BadReason] = {}
        self._rows_seen = 0
        self._bad_seen = 0

    def __len__(self) -> int:
        return len(self.reasons)

    def add(self, sample_id: torch.Tensor, bad_reason: torch.Tensor) -> torch.Tensor:
        """Take in a batch and return the positions of its good rows.

        Args:
            sample_id: int64 `(B,)` on the CPU.
            bad_reason: int8 `(B,)` on the CPU, see `BadReason`.

        Returns:
            int64 `(number of good rows,)`.

        Raises:
            TooManyBadRows: the limit is passed; the message names ids and reasons.
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

    def state(self) -> dict:
        """All that was counted, as plain data, to go on from after a resume."""
        reasons = {str(sample_id): int(reason) for sample_id, reason in self.reasons.items()}
        return {"reasons": reasons, "rows_seen": self._rows_seen, "bad_seen": self._bad_seen}

    def restore(self, *states: dict) -> None:
        """Go on from what `state` gave, on this rank or, taken together, on several."""
        for state in states:
            self.reasons |= {int(sample_id): BadReason(reason) for sample_id, reason in state["reasons"].items()}
            self._rows_seen += state["rows_seen"]
            self._bad_seen += state["bad_seen"]

    def summary(self, max_ids: int = 1000) -> dict:
        """`count`, `reasons` (description to count) and the first `ids`, for `metrics.json`."""
        counts = Counter(reason.description for reason in self.reasons.values())
        return {"count": len(self), "reasons": dict(counts), "ids": sorted(self.reasons)[:max_ids]}

    def _check(self) -> None:
        # A stream does not tell how long it is: there, rows count as often as they are seen, good and bad alike.
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
