"""Computes retrieval figures from the outputs of a Trainer's evaluation loop."""

import logging
from typing import Any

from transformers import EvalPrediction

from hf_dissect.evaluation.recall import retrieval_from_pairs

logger = logging.getLogger(__name__)


def retrieval_of_predictions(predictions: EvalPrediction) -> dict[str, float]:
    """Compute the retrieval metrics of all readable pairs.

    Args:
        predictions: `predictions` are image and text embeddings `(pairs, D)`; `label_ids` are the image keys, equal
            for pairs of one image, and the reason why a pair is bad, 0 for a good one, each `(pairs,)`.

    Returns:
        The figures of `retrieval_from_pairs`; empty if no pair is readable. A warning counts the unreadable pairs.
    """
    outputs: Any = predictions.predictions  # transformers types both fields as tuples of one array
    labels: Any = predictions.label_ids
    image_embeds, text_embeds = outputs
    image_key, bad_reason = labels
    good = bad_reason == 0
    if not good.all():
        logger.warning("%d of %d evaluation pairs cannot be read and are left out.", (~good).sum(), len(good))
    if not good.any():
        return {}
    return retrieval_from_pairs(image_embeds[good], text_embeds[good], image_key[good])
