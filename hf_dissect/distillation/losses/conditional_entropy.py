"""Adversarial minimisation of H(T|S): what the student knows must do to make features that pass for the teacher's."""

from collections.abc import Callable, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from hf_dissect.distillation.losses.mean_over_rows import mean_over_rows
from hf_dissect.distributed import get_rank_and_world_size


class Discriminator(nn.Module):
    """Tells teacher's features from generated ones, given the student's features.

    Its layers are spectrally normalised (arXiv 1802.05957). That bounds the gradient that the student gets: without it
    a confident discriminator drowns the student's task.

    Args:
        teacher_size, student_size: of the features.
        hidden_size: of its two layers.
    """

    def __init__(self, teacher_size: int, student_size: int, hidden_size: int = 128):
        super().__init__()
        self.layers = nn.Sequential(
            spectral_norm(nn.Linear(teacher_size + student_size, hidden_size)),
            nn.LeakyReLU(0.2),
            spectral_norm(nn.Linear(hidden_size, hidden_size)),
            nn.LeakyReLU(0.2),
            spectral_norm(nn.Linear(hidden_size, 1)),
        )

    def forward(self, teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
        """Logits `(B,)`, positive for what is taken for the teacher's, of `(B, D_t)` and `(B, D_s)`."""
        return self.layers(torch.cat([teacher, student], dim=-1)).squeeze(-1)


def generator_loss(
    discriminator: nn.Module, generated: torch.Tensor, student: torch.Tensor, counted: torch.Tensor
) -> torch.Tensor:
    """How far generated features are from passing for the teacher's: `log(1 - D(G(s), s))`, the minimax form.

    Its gradient fades where the discriminator is sure, and so leaves the student in peace while the generator, led by
    the anchor, is still far from t; that of the usual `-log D` is then largest, the same for all rows, and drowns the
    student's task.

    The gradient reaches the student through G alone: as a condition, s is given to D as it is, lest the student learn
    to withhold what tells real from generated.

    Args:
        generated: `(B, D_t)` with gradient.
        student: `(B, D_s)`, brought to unit deviation.
        counted: bool `(B,)`.
    """
    logits = discriminator(generated.float(), student.detach().float())
    return mean_over_rows(-F.softplus(logits), counted)


def anchor_loss(generated: torch.Tensor, real: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """Mean squared error of `(B, D_t)` per number: of features at unit deviation, 1 is the error of knowing nothing.

    Up to constants it bounds H(T|S) from above, with a Gaussian about G(s) in the place of p(t|s). Without it, G and D
    chase each other in a direction that all rows share, and the student's features collapse along it.
    """
    return mean_over_rows((generated.float() - real.detach().float()).square().mean(-1), counted)


def discriminator_loss(
    discriminator: nn.Module,
    real: torch.Tensor,
    generated: torch.Tensor,
    student: torch.Tensor,
    counted: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The cross-entropy of telling (t, s) from (G(s), s), and the share told rightly; nothing but D gets gradient.

    Returns:
        The loss, and the accuracy in [0, 1], each a scalar whose average over the ranks is that of the union.
    """
    real, generated, student = (part.detach().float() for part in (real, generated, student))
    logits = discriminator(torch.cat([real, generated]), torch.cat([student, student]))
    real_logits, generated_logits = logits.chunk(2)
    losses = (F.softplus(-real_logits) + F.softplus(generated_logits)) / 2
    right = ((real_logits > 0).float() + (generated_logits < 0).float()) / 2
    return mean_over_rows(losses, counted), mean_over_rows(right, counted).detach()


class Adversary:
    """The discriminator with its own optimiser, updated once in each optimiser step of the rest.

    It works in single precision whatever the rest does, on the features of the same forward pass, and averages its
    gradients over the ranks by itself.

    Args:
        discriminator: on its device.
        learning_rate: of its Adam, constant.
    """

    def __init__(self, discriminator: Discriminator, learning_rate: float):
        self.discriminator = discriminator
        # Betas as usual against a moving opponent (DCGAN, arXiv 1511.06434).
        self.optimizer = torch.optim.Adam(discriminator.parameters(), lr=learning_rate, betas=(0.5, 0.999))

    @contextmanager
    def fixed(self):
        """Inside the block, gradients pass through the discriminator and leave none in it."""
        self.discriminator.requires_grad_(False)
        try:
            yield self.discriminator
        finally:
            self.discriminator.requires_grad_(True)

    def accumulate(self, loss: Callable[[nn.Module], tuple[torch.Tensor, torch.Tensor]], share: float) -> torch.Tensor:
        """Add the gradients of `share` times a loss of this micro-batch; returns the accuracy that came with it."""
        with torch.autocast(next(self.discriminator.parameters()).device.type, enabled=False):
            value, accuracy = loss(self.discriminator)
        (value * share).backward()
        return accuracy

    def step(self) -> None:
        """Average the gradients over the ranks and update."""
        world_size = get_rank_and_world_size()[1]
        for parameter in self.discriminator.parameters():
            if world_size > 1:
                dist.all_reduce(parameter.grad)
                parameter.grad /= world_size
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return weights and moments by name."""
        found = {f"weight.{name}": value for name, value in self.discriminator.state_dict().items()}
        for number, moments in self.optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{number}.{name}": value for name, value in moments.items()}
        return {name: value.detach().cpu().clone() for name, value in found.items()}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Continue from a saved state."""
        weights = {name.removeprefix("weight."): value for name, value in state.items() if name.startswith("weight.")}
        self.discriminator.load_state_dict(weights)
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in state.items():
            if name.startswith("optimizer."):
                _, number, moment = name.split(".")
                moments.setdefault(int(number), {})[moment] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
