"""Scores of how likely image and caption do not belong together, for the pairs of any image-text data set."""

from hf_dissect.auditing.cross_fit import CrossFit, FitSettings, PairInputs, cross_fit
from hf_dissect.auditing.scores import MatchScores, score_matches
from hf_dissect.auditing.two_groups import TwoGroups, find_largest_set, fit_two_groups

__all__ = [
    "CrossFit",
    "FitSettings",
    "MatchScores",
    "PairInputs",
    "TwoGroups",
    "cross_fit",
    "find_largest_set",
    "fit_two_groups",
    "score_matches",
]
