"""Predictions of a batch of pairs, and the retrieval figures of all that a Trainer's evaluation loop gathers."""

import logging
from collections.abc import Mapping

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
    """Retrieval metrics of all readable pairs; none, with a warning, when there are no readable pairs.

    Args:
        predictions: `predictions` are image and text embeddings `(pairs, D)`; `label_ids` the image keys, equal for
            pairs of one image, and the reasons why a pair is bad, 0 for a good one, each `(pairs,)`.
    """
    image_embeds, text_embeds = predictions.predictions
    image_key, bad_reason = predictions.label_ids
    good = bad_reason == 0
    if not good.all():
        logger.warning("%d of %d evaluation pairs cannot be read and are left out.", (~good).sum(), len(good))
    if not good.any():
        return {}
    return retrieval_from_pairs(image_embeds[good], text_embeds[good], image_key[good])
