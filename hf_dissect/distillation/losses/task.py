"""Losses of the task: classification, retrieval of rows of the same class, and imitation of the teacher's answers."""

import torch
import torch.nn.functional as F

from hf_dissect.distillation.losses.mean_over_rows import mean_over_rows
from hf_dissect.distributed import gather_last_dimension, gather_with_grad, get_rank_and_world_size


def classification_loss(
    logits: torch.Tensor, labels: torch.Tensor, counted: torch.Tensor, label_smoothing: float = 0.0
) -> torch.Tensor:
    """Compute the cross-entropy, averaged over the counted rows of all ranks.

    Args:
        logits: Scores of the classes, `(B, C)`.
        labels: Classes, int64 `(B,)`.
        counted: Mask of the counted rows, bool `(B,)`.
        label_smoothing: Share of the target that is spread evenly over the classes, in [0, 1).
    """
    losses = F.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=label_smoothing)
    return mean_over_rows(losses, counted)


def retrieval_loss(
    embeds: torch.Tensor, labels: torch.Tensor, counted: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Compute the supervised contrastive loss of Khosla et al. (arXiv 2004.11362, equation 2) over all ranks.

    Args:
        embeds: Embeddings of unit length, `(B, E)`, equally many rows on every rank.
        labels: Classes, int64 `(B,)`.
        counted: Mask of the rows that serve as anchors and candidates, bool `(B,)`.
        temperature: Divisor of the cosines.

    Returns:
        The mean over the anchors that have a candidate of their class; 0 if there is no such anchor.
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
    """Compute the divergence of the student's softened predictions from the teacher's.

    The loss of a row is `temperature ** 2 * KL(softmax(teacher / temperature) || softmax(student / temperature))`
    (Hinton et al., arXiv 1503.02531, section 2). The teacher gets no gradient.

    Args:
        student_logits: Logits of the student, `(B, C)` with gradient.
        teacher_logits: Logits of the teacher, `(B, C)`.
        counted: Mask of the counted rows, bool `(B,)`.
        temperature: Divisor of the logits.
    """
    target = F.log_softmax(teacher_logits.detach().float() / temperature, dim=-1)
    predicted = F.log_softmax(student_logits.float() / temperature, dim=-1)
    losses = F.kl_div(predicted, target, reduction="none", log_target=True).sum(-1) * temperature**2
    return mean_over_rows(losses, counted)
