"""Predictions for pairs, and the retrieval figures of the predictions that a Trainer gathers."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from transformers import EvalPrediction

from hf_dissect.evaluation.recall import retrieval_from_pairs
from hf_dissect.losses.contrastive import ContrastiveLoss, per_pair_loss
from hf_dissect.losses.logit_rows import find_false_negatives

logger = logging.getLogger(__name__)


def predict_pairs(
    outputs: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor], contrastive_loss: ContrastiveLoss
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Return the loss, the predictions and the labels of a prediction step.

    Args:
        outputs: Outputs of the model for `B` pairs.
        batch: Batch of a `SelectionCollator`, with or without unreadable pairs.
        contrastive_loss: Loss of the run, for its kind and its mask of false negatives.

    Returns:
        Mean loss `()` of the readable pairs; embeddings of images and texts, float32 `(B, D)` each; image keys,
        reasons for unreadable pairs and caption keys, `(B,)` each.
    """
    sample_id = batch["sample_id"]
    bad_reason = batch.get("bad_reason", torch.zeros_like(sample_id))
    image_key, caption_key = (batch.get(name, sample_id) for name in ("image_key", "caption_key"))
    good = bad_reason == 0
    keys = torch.stack([image_key, caption_key])[:, good]
    mask = find_false_negatives(keys, keys) if contrastive_loss.mask_false_negatives else None
    logits = outputs["logits_per_text"][good][:, good]
    loss = per_pair_loss(logits, kind=contrastive_loss.kind, mask=mask).mean().detach()
    embeds = (outputs["image_embeds"].detach().float(), outputs["text_embeds"].detach().float())
    return loss, embeds, (image_key, bad_reason, caption_key)


def compute_retrieval(predictions: EvalPrediction) -> dict[str, float]:
    """Compute the retrieval metrics of all readable pairs.

    Args:
        predictions: Predictions and labels of `predict_pairs`, over all pairs: `predictions` holds image and text
            embeddings `(pairs, D)`, `label_ids` holds image keys, reasons and caption keys `(pairs,)`.

    Returns:
        Figures of `retrieval_from_pairs`; empty if no pair is readable. A warning counts the unreadable pairs.
    """
    outputs: Any = predictions.predictions  # transformers types both fields as tuples of a single array
    labels: Any = predictions.label_ids
    image_embeds, text_embeds = outputs
    image_key, bad_reason, caption_key = labels
    good = bad_reason == 0
    if not good.all():
        logger.warning("%d of %d evaluation pairs cannot be read and are left out.", (~good).sum(), len(good))
    if not good.any():
        return {}
    return retrieval_from_pairs(image_embeds[good], text_embeds[good], image_key[good], caption_key[good])
