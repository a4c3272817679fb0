"""Choice of the pairs that an export keeps, and refusal where the scores know too little for it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hf_dissect.auditing.export import check_folder
from hf_dissect.auditing.two_groups import TwoGroups, find_largest_set

THRESHOLD = 0.5
"""Probability above which a pair counts as mismatched."""

LEAST_SEPARATION = 0.8
"""AUROC of pairs that belong together against strangers below which an audit cannot say which pairs are mismatched.

Of 1,000 pairs with 15 % mismatched, the interval of the share is 44 points wide at 0.68, 23 at 0.8 and 10 at 0.9.
"""


@dataclass(frozen=True)
class ExportSettings:
    """Settings of an export without the suspicious pairs.

    Attributes:
        folder: New folder; None exports nothing.
        keep: Share of the readable pairs to keep, the best ones, in (0, 1].
        threshold: Highest `p_mismatched` to keep, in [0, 1]; 0.5 where nothing is given.
        max_fdr: Largest expected share of mismatched pairs among those kept, in (0, 1).
        anyway: True to export even if the scores know too little.
    """

    folder: Path | None = None
    keep: float | None = None
    threshold: float | None = None
    max_fdr: float | None = None
    anyway: bool = False

    def check(self) -> None:
        """Check the settings before any work.

        Raises:
            ValueError: Settings exclude each other or are out of range, or the folder is not empty.
        """
        given = {"--keep": self.keep, "--threshold": self.threshold, "--max-fdr": self.max_fdr}
        chosen = [name for name, value in given.items() if value is not None]
        for name in [*chosen, *(["--export-anyway"] if self.anyway else [])]:
            if self.folder is None:
                raise ValueError(f"{name} is a setting of --export-clean; name a folder with --export-clean as well.")
        if len(chosen) > 1:
            both = "both" if len(chosen) == 2 else "all"
            raise ValueError(f"{' and '.join(chosen)} {both} choose the pairs to keep; give one of them.")
        if self.keep is not None and not 0 < self.keep <= 1:
            raise ValueError(
                f"--keep {self.keep} is not allowed; allowed: a share of the pairs, above 0 and at most 1."
            )
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ValueError(f"--threshold {self.threshold} is not allowed; allowed: a probability, from 0 to 1.")
        if self.max_fdr is not None and not 0 < self.max_fdr < 1:
            raise ValueError(
                f"--max-fdr {self.max_fdr} is not allowed; allowed: a share of the pairs, between 0 and 1."
            )
        if self.folder is not None:
            check_folder(self.folder)

    def check_scores(self, groups: TwoGroups | None, num_trained: int, where: Path) -> None:
        """Check that the scores know enough for the export.

        Args:
            groups: Estimates; None where the model trained on all pairs.
            num_trained: Number of pairs that the model trained on.
            where: Folder of the audit, for the message.

        Raises:
            ValueError: They do not, and `anyway` is not set.
        """
        if self.folder is None or self.anyway:
            return
        reason = None
        if num_trained:
            reason = f"the model trained on {num_trained:,} of these pairs, which it may have learnt by heart"
        elif groups is not None and groups.separation < LEAST_SEPARATION:
            low, high = groups.interval
            reason = (
                f"the model separates these pairs from recombined ones with an AUROC of {groups.separation:.2f} only "
                f"(at least {LEAST_SEPARATION} is asked for), so that anything between {low:.0%} and {high:.0%} "
                "of them may be mismatched"
            )
        if reason is not None:
            raise ValueError(
                f"--export-clean is refused: {reason}. Let encoders be fitted to these data (hf-dissect audit --fit "
                "DATA), name a model that knows such data better, or export all the same with --export-anyway. "
                f"The audit is in {where}."
            )

    def choose(self, rank: np.ndarray, groups: TwoGroups | None) -> np.ndarray:
        """Return a mask of the pairs to keep, bool `(n,)`.

        Args:
            rank: Scores that the pairs are ranked by, float `(n,)`.
            groups: Estimates of the same pairs; None where these are unknown.

        Raises:
            ValueError: The pairs have no probabilities, or no set of pairs has so low an expected share.
        """
        if self.keep is not None:
            kept = np.zeros(len(rank), bool)
            kept[np.argsort(-rank, kind="stable")[: max(1, round(self.keep * len(rank)))]] = True
            return kept
        if groups is None or len(groups.p_mismatched) != len(rank):
            raise ValueError(
                "Pairs that the model trained on have no p_mismatched to choose by; give --keep, the share of the "
                "pairs to keep."
            )
        if self.max_fdr is None:
            return groups.p_mismatched <= (THRESHOLD if self.threshold is None else self.threshold)
        kept = find_largest_set(groups.local_fdr, rank, self.max_fdr)
        if not kept.any():
            raise ValueError(
                f"--max-fdr {self.max_fdr}: no set of pairs has so low an expected share of mismatched ones; the best "
                f"pair has {groups.local_fdr.min():.3f}. Give a higher one, or a model that knows such data better."
            )
        return kept
