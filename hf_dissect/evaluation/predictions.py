"""Predictions of a batch of pairs, and the retrieval figures of all that a Trainer's evaluation loop gathers."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from transformers import EvalPrediction

from hf_dissect.evaluation.recall import retrieval_from_pairs
from hf_dissect.losses.contrastive import per_pair_loss

logger = logging.getLogger(__name__)


def predict_pairs(
    outputs: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor], *, kind: str
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Return what a prediction step gives: loss, predictions and labels.

    Args:
        outputs: Outputs of the model for `B` pairs.
        batch: Batch of a `SelectionCollator`, some pairs of which may be unreadable.
        kind: Loss of the model, "softmax" or "sigmoid".

    Returns:
        The mean loss of the good pairs; the embeddings of images and texts, float32 `(B, D)`; the image keys and the
        reasons why a pair is bad, `(B,)`.
    """
    bad_reason = batch.get("bad_reason", torch.zeros_like(batch["sample_id"]))
    good = bad_reason == 0
    loss = per_pair_loss(outputs["logits_per_text"][good][:, good], kind=kind).mean().detach()
    embeds = (outputs["image_embeds"].detach().float(), outputs["text_embeds"].detach().float())
    return loss, embeds, (batch.get("image_key", batch["sample_id"]), bad_reason)


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
