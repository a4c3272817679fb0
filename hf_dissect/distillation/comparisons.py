"""Networks that compare features of a row: projections for contrasts, and a generator of one from the other."""

import torch
from torch import nn

from hf_dissect.distributed import gather_last_dimension, gather_with_grad


class RowStandardisation(nn.Module):
    """Zero mean and unit deviation of each feature over the rows of a batch, in evaluation over those of the run.

    Pooled features of an encoder that starts to learn are nearly the same for all rows. Their cosines are then all
    nearly 1, and a contrast moves what the rows share instead of what distinguishes them. This is batch normalisation
    without weights (arXiv 1502.03167), over the counted rows of all ranks.

    Args:
        size: Number of features.
        momentum: Share of a batch in the running statistics.
    """

    mean: torch.Tensor
    deviation: torch.Tensor
    num_batches: torch.Tensor

    def __init__(self, size: int, momentum: float = 0.1) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("deviation", torch.ones(size))
        self.register_buffer("num_batches", torch.tensor(0))

    def forward(self, x: torch.Tensor, counted: torch.Tensor | None = None) -> torch.Tensor:
        """Standardise features `(B, D)`, in single precision.

        Args:
            x: Features, equally many rows on every rank.
            counted: Mask of the rows that the statistics are made of, bool `(B,)`; None for all.
        """
        x = x.float()
        if not self.training:
            return (x - self.mean) / self.deviation
        counted = torch.ones(len(x), dtype=torch.bool, device=x.device) if counted is None else counted
        present = gather_last_dimension(counted.to(torch.uint8)[None])[0].bool()
        rows = gather_with_grad(x)[present]
        if len(rows) < 2:
            return (x - self.mean) / self.deviation
        mean, deviation = rows.mean(0), (rows.var(0, correction=0) + 1e-5).sqrt()
        with torch.no_grad():
            share = self.momentum if self.num_batches else 1.0
            self.mean.lerp_(mean.to(self.mean), share)
            self.deviation.lerp_(deviation.to(self.deviation), share)
            self.num_batches += 1
        return (x - mean) / deviation


class Comparison(nn.Module):
    """Two projections to vectors of unit length, whose cosines are high for an x and a y of the same row.

    Each projection has a hidden layer, so that the features may keep what the task needs even though the vectors have
    to separate all rows (SimCLR, arXiv 2002.05709, section 4.2).

    Args:
        x_size: Size of the x.
        y_size: Size of the y.
        size: Size of the vectors.
        standardises: True to standardise the features over the rows first.
    """

    def __init__(self, x_size: int, y_size: int, size: int, *, standardises: bool = True) -> None:
        super().__init__()
        self.standardise_x = RowStandardisation(x_size) if standardises else None
        self.standardise_y = RowStandardisation(y_size) if standardises else None
        self.x, self.y = (
            nn.Sequential(nn.Linear(width, 2 * size), nn.GELU(), nn.Linear(2 * size, size))
            for width in (x_size, y_size)
        )

    def forward(
        self, x: torch.Tensor, y: torch.Tensor, counted: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Project features to vectors, in single precision.

        Args:
            x: Features `(B, x_size)`.
            y: Features `(B, y_size)`.
            counted: Mask of the rows that are compared, bool `(B,)`; None for all.

        Returns:
            Vectors of x and of y, `(B, size)` each.
        """
        if self.standardise_x is not None and self.standardise_y is not None:
            x, y = self.standardise_x(x, counted), self.standardise_y(y, counted)
        normalize = nn.functional.normalize
        return normalize(self.x(x).float(), dim=-1), normalize(self.y(y).float(), dim=-1)


class Generator(nn.Module):
    """Network that predicts the teacher's features, at zero mean and unit deviation, from the student's.

    It normalises nothing: normalisation would divide by the small deviations at the start, and the gradient that
    reaches the student would drown that of its task.

    Args:
        student_size: Size of the student's features.
        teacher_size: Size of the teacher's features.
    """

    def __init__(self, student_size: int, teacher_size: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(student_size, 2 * teacher_size),
            nn.GELU(),
            nn.Linear(2 * teacher_size, teacher_size),
        )

    def forward(self, student: torch.Tensor) -> torch.Tensor:
        """Predict features `(B, teacher_size)` from the student's `(B, student_size)`, in single precision."""
        return self.layers(student).float()
