"""What each network is for: to classify, and to bring rows of the same class together for retrieval."""

import torch
import torch.nn.functional as F

from hf_dissect.distillation.losses.mean_over_rows import mean_over_rows
from hf_dissect.distributed import gather_last_dimension, gather_with_grad, get_rank_and_world_size


def classification_loss(
    logits: torch.Tensor, labels: torch.Tensor, counted: torch.Tensor, label_smoothing: float = 0.0
) -> torch.Tensor:
    """Cross-entropy of `(B, C)` against int64 `(B,)`, the mean over the counted rows of all ranks."""
    losses = F.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=label_smoothing)
    return mean_over_rows(losses, counted)


def retrieval_loss(
    embeds: torch.Tensor, labels: torch.Tensor, counted: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Supervised contrastive loss (Khosla et al., arXiv 2004.11362, equation 2) among the rows of all ranks.

    Args:
        embeds: `(B, E)` of unit length, equally many rows on every rank.
        labels: int64 `(B,)`.
        counted: bool `(B,)`; other rows are neither anchors nor candidates.
        temperature: that the cosines are divided by.

    Returns:
        The mean over the anchors that have another row of their class; 0 without any.
    """
    with torch.autocast(embeds.device.type, enabled=False):
        embeds = embeds.float()
        columns = gather_with_grad(embeds)
        keys = gather_last_dimension(torch.stack([labels, counted.long()]))
        places = get_rank_and_world_size()[0] * len(embeds) + torch.arange(len(embeds), device=embeds.device)
        others = keys[1].bool() & (torch.arange(len(columns), device=embeds.device) != places[:, None])
        positives = others & (labels[:, None] == keys[0])
        logits = (embeds @ columns.T / temperature).masked_fill(~others, -1e9)
        log_shares = logits.log_softmax(-1)
        losses = -torch.where(positives, log_shares, 0).sum(-1) / positives.sum(-1).clamp_min(1)
        return mean_over_rows(losses, counted & positives.any(-1))


def hinton_loss(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, counted: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Divergence of the student's softened predictions from the teacher's (Hinton et al., arXiv 1503.02531).

    `temperature ** 2 * KL(softmax(teacher / temperature) || softmax(student / temperature))`; the teacher gets no
    gradient.
    """
    target = F.log_softmax(teacher_logits.detach().float() / temperature, dim=-1)
    found = F.log_softmax(student_logits.float() / temperature, dim=-1)
    losses = F.kl_div(found, target, reduction="none", log_target=True).sum(-1) * temperature**2
    return mean_over_rows(losses, counted)
