"""Ranks the pairs of any image-text data set by how likely image and caption do not belong together."""

from hf_dissect.audit.scores import match_scores, mismatched_share, p_mismatched
from hf_dissect.runs.audit import AuditResult, audit

__all__ = ["AuditResult", "audit", "match_scores", "mismatched_share", "p_mismatched"]
