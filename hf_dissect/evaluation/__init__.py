"""Metrics of a trained model: plain functions, and the same as `evaluate` modules that need no network."""

from hf_dissect.evaluation.accuracy import zero_shot_metrics
from hf_dissect.evaluation.modules import MODULE_NAMES, load
from hf_dissect.evaluation.noise_recognition import noise_detection_metrics
from hf_dissect.evaluation.recall import count_repeats, retrieval_from_pairs, retrieval_metrics, retrieval_ranks
from hf_dissect.evaluation.tables import format_results_table, summarise_seeds
from hf_dissect.evaluation.zero_shot_classifier import class_embeddings, evaluate_zero_shot

__all__ = [
    "MODULE_NAMES",
    "class_embeddings",
    "count_repeats",
    "evaluate_zero_shot",
    "format_results_table",
    "load",
    "noise_detection_metrics",
    "retrieval_from_pairs",
    "retrieval_metrics",
    "retrieval_ranks",
    "summarise_seeds",
    "zero_shot_metrics",
]
