"""Scores of how likely image and caption do not belong together, for the pairs of any image-text data set."""

from hf_dissect.auditing.scores import (
    MatchScores,
    estimate_mismatched_probability,
    estimate_mismatched_share,
    score_matches,
)

__all__ = ["MatchScores", "estimate_mismatched_probability", "estimate_mismatched_share", "score_matches"]
