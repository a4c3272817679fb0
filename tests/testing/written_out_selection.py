"""Contrastive losses and learnability written out pair by pair, and scores to try them on."""

import math

import torch
import torch.nn.functional as F

from hf_dissect.selection import CandidateScores


def scores_of(seed: int, size: int = 12, kind: str = "softmax", dim: int = 8, noise: float = 0.7) -> CandidateScores:
    generator = torch.Generator().manual_seed(seed)
    image = F.normalize(torch.randn(size, dim, generator=generator), dim=-1)
    text = F.normalize(image + noise * torch.randn(size, dim, generator=generator), dim=-1)
    bias = -3.0 if kind == "sigmoid" else 0.0
    return CandidateScores(torch.arange(100, 100 + size), image, text, 10.0, bias, kind)


def logits_of(scores: CandidateScores) -> list[list[float]]:
    return [
        [float(text @ image) * float(scores.logit_scale) + float(scores.logit_bias) for image in scores.image_embeds]
        for text in scores.text_embeds
    ]


def softplus(value: float) -> float:
    return math.log1p(math.exp(-abs(value))) + max(value, 0.0)


def own_losses(scores: CandidateScores) -> list[float]:
    """Loss of each pair among all (softmax), or of being a pair (sigmoid)."""
    logits, losses = logits_of(scores), []
    for i, row in enumerate(logits):
        column = [line[i] for line in logits]
        if scores.kind == "sigmoid":
            losses.append(softplus(-row[i]))
        else:
            losses.append(sum(math.log(sum(map(math.exp, part))) - row[i] for part in (row, column)) / 2)
    return losses


def summed_loss(logits: list[list[float]], chosen: list[int], kind: str) -> float:
    """Contrastive loss of a sub-batch, summed over its pairs."""
    total = 0.0
    for i in chosen:
        if kind == "sigmoid":
            total += sum(softplus(-logits[i][j] if i == j else logits[i][j]) for j in chosen)
        else:
            for part in ([logits[i][j] for j in chosen], [logits[j][i] for j in chosen]):
                total += (math.log(sum(map(math.exp, part))) - logits[i][i]) / 2
    return total
