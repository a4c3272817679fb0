"""Ranks the pairs of any image-text data set by how likely image and caption do not belong together."""

from hf_dissect.audit.run import AuditResult, audit
from hf_dissect.audit.scores import match_scores, mismatched_share, p_mismatched

__all__ = ["AuditResult", "audit", "match_scores", "mismatched_share", "p_mismatched"]
