"""Predictions for pairs, and the retrieval figures of the predictions that a Trainer gathers."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from transformers import EvalPrediction

from hf_dissect.evaluation.recall import retrieval_from_pairs
from hf_dissect.losses.contrastive import per_pair_loss
from hf_dissect.models.families import check_outputs

logger = logging.getLogger(__name__)


def predict_pairs(
    outputs: Mapping[str, torch.Tensor],
    batch: Mapping[str, torch.Tensor],
    *,
    kind: str,
    scale_and_bias: tuple[torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Return the loss, the predictions and the labels of a prediction step.

    Args:
        outputs: Outputs of the model for `B` pairs.
        batch: Batch of a `SelectionCollator`, with or without unreadable pairs.
        kind: Loss of the model, "softmax" or "sigmoid".
        scale_and_bias: Factor and summand of the logits, `()` each, for a model that returns no logits.

    Returns:
        Mean loss `()` of the readable pairs; embeddings of images and texts, float32 `(B, D)` each; image keys and
        reasons for unreadable pairs, `(B,)` each.
    """
    check_outputs(outputs)
    bad_reason = batch.get("bad_reason", torch.zeros_like(batch["sample_id"]))
    good = bad_reason == 0
    logits = outputs.get("logits_per_text")
    if logits is None:
        scale, bias = scale_and_bias
        logits = outputs["text_embeds"] @ outputs["image_embeds"].T * scale + bias
    loss = per_pair_loss(logits[good][:, good], kind=kind).mean().detach()
    embeds = (outputs["image_embeds"].detach().float(), outputs["text_embeds"].detach().float())
    return loss, embeds, (batch.get("image_key", batch["sample_id"]), bad_reason)


def compute_retrieval(predictions: EvalPrediction) -> dict[str, float]:
    """Compute the retrieval metrics of all readable pairs.

    Args:
        predictions: Predictions and labels of `predict_pairs`, over all pairs: `predictions` holds image and text
            embeddings `(pairs, D)`, `label_ids` holds image keys and reasons `(pairs,)`.

    Returns:
        Figures of `retrieval_from_pairs`; empty if no pair is readable. A warning counts the unreadable pairs.
    """
    outputs: Any = predictions.predictions  # transformers types both fields as tuples of a single array
    labels: Any = predictions.label_ids
    image_embeds, text_embeds = outputs
    image_key, bad_reason = labels
    good = bad_reason == 0
    if not good.all():
        logger.warning("%d of %d evaluation pairs cannot be read and are left out.", (~good).sum(), len(good))
    if not good.any():
        return {}
    return retrieval_from_pairs(image_embeds[good], text_embeds[good], image_key[good])
