"""Adversarial minimisation of H(T|S): features generated from the student's have to pass for the teacher's."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from hf_dissect.distillation.losses.mean_over_rows import mean_over_rows
from hf_dissect.distributed import get_rank_and_world_size


class Discriminator(nn.Module):
    """Network that separates the teacher's features from generated ones, given the student's features.

    Spectral normalisation of its layers (arXiv 1802.05957) bounds the gradient that reaches the student. Without it,
    the gradient of a confident discriminator drowns that of the student's task.

    Args:
        teacher_size: Size `D_t` of the teacher's features.
        student_size: Size `D_s` of the student's features.
        hidden_size: Width of the two hidden layers.
    """

    def __init__(self, teacher_size: int, student_size: int, hidden_size: int = 128) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            spectral_norm(nn.Linear(teacher_size + student_size, hidden_size)),
            nn.LeakyReLU(0.2),
            spectral_norm(nn.Linear(hidden_size, hidden_size)),
            nn.LeakyReLU(0.2),
            spectral_norm(nn.Linear(hidden_size, 1)),
        )

    def forward(self, teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
        """Score features.

        Args:
            teacher: Features of the teacher, or generated ones, `(B, D_t)`.
            student: Features of the student for the same rows, `(B, D_s)`.

        Returns:
            Logits `(B,)`, positive for features that are taken for the teacher's.
        """
        return self.layers(torch.cat([teacher, student], dim=-1)).squeeze(-1)


def generator_loss(
    discriminator: nn.Module, generated: torch.Tensor, student: torch.Tensor, counted: torch.Tensor
) -> torch.Tensor:
    """Compute `log(1 - D(G(s), s))`, the minimax form of the generator's loss.

    The gradient of this form vanishes where the discriminator is sure. It therefore does not disturb the student while
    the generator, which the anchor leads, is still far from the teacher's features. The usual form `-log D` has its
    largest gradient there, the same for all rows, which drowns that of the student's task.

    The gradient reaches the student through the generator only. The student's features as condition of the
    discriminator get none; otherwise the student would learn to hide what separates real from generated features.

    Args:
        discriminator: Discriminator `D(t, s)`.
        generated: Generated features, `(B, D_t)` with gradient.
        student: Features of the student at unit deviation, `(B, D_s)`.
        counted: Mask of the counted rows, bool `(B,)`.
    """
    logits = discriminator(generated.float(), student.detach().float())
    return mean_over_rows(-F.softplus(logits), counted)


def anchor_loss(generated: torch.Tensor, real: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """Compute the mean squared error of generated features.

    Up to constants it is an upper bound of H(T|S), with a Gaussian around G(s) in place of p(t|s). Without this loss,
    generator and discriminator chase each other in a direction that all rows share, and the student's features
    collapse along it. For features at unit deviation, a constant generator has the loss 1.

    Args:
        generated: Generated features, `(B, D_t)` with gradient.
        real: Features of the teacher, `(B, D_t)`.
        counted: Mask of the counted rows, bool `(B,)`.
    """
    return mean_over_rows((generated.float() - real.detach().float()).square().mean(-1), counted)


def discriminator_loss(
    discriminator: nn.Module,
    real: torch.Tensor,
    generated: torch.Tensor,
    student: torch.Tensor,
    counted: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the discriminator's cross-entropy between (t, s) and (G(s), s); only the discriminator gets a gradient.

    Args:
        discriminator: Discriminator `D(t, s)`.
        real: Features of the teacher, `(B, D_t)`.
        generated: Generated features, `(B, D_t)`.
        student: Features of the student at unit deviation, `(B, D_s)`.
        counted: Mask of the counted rows, bool `(B,)`.

    Returns:
        Loss and accuracy in [0, 1], scalars whose averages over the ranks are those of all rows.
    """
    real, generated, student = (part.detach().float() for part in (real, generated, student))
    logits = discriminator(torch.cat([real, generated]), torch.cat([student, student]))
    real_logits, generated_logits = logits.chunk(2)
    losses = (F.softplus(-real_logits) + F.softplus(generated_logits)) / 2
    right = ((real_logits > 0).float() + (generated_logits < 0).float()) / 2
    return mean_over_rows(losses, counted), mean_over_rows(right, counted).detach()


class Adversary:
    """Discriminator with its own optimiser, updated once per optimiser step of the other networks.

    It computes in single precision, whatever the precision of the run, on features of the same forward pass. It
    averages its gradients over the ranks itself.

    Args:
        discriminator: Discriminator, on its device.
        learning_rate: Constant learning rate of Adam.
    """

    def __init__(self, discriminator: Discriminator, learning_rate: float) -> None:
        self.discriminator = discriminator
        # The usual betas for an opponent that changes as well (DCGAN, arXiv 1511.06434).
        self.optimizer = torch.optim.Adam(discriminator.parameters(), lr=learning_rate, betas=(0.5, 0.999))

    @contextmanager
    def frozen(self) -> Iterator[Discriminator]:
        """Yield the discriminator; inside the block, gradients pass through it and its weights collect none."""
        self.discriminator.requires_grad_(False)
        try:
            yield self.discriminator
        finally:
            self.discriminator.requires_grad_(True)

    def accumulate(self, loss: Callable[[nn.Module], tuple[torch.Tensor, torch.Tensor]], share: float) -> torch.Tensor:
        """Add the gradients of one micro-batch.

        Args:
            loss: Function from the discriminator to loss and accuracy.
            share: Share of the micro-batch in the optimiser step, in (0, 1].

        Returns:
            The accuracy, a scalar.
        """
        with torch.autocast(next(self.discriminator.parameters()).device.type, enabled=False):
            value, accuracy = loss(self.discriminator)
        (value * share).backward()
        return accuracy

    def step(self) -> None:
        """Average the gradients over the ranks and update the weights."""
        world_size = get_rank_and_world_size()[1]
        for gradient in (parameter.grad for parameter in self.discriminator.parameters()):
            if world_size > 1 and gradient is not None:
                dist.all_reduce(gradient)
                gradient /= world_size
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the weights and the moments of Adam, by name."""
        state = {f"weight.{name}": value for name, value in self.discriminator.state_dict().items()}
        for number, moments in self.optimizer.state_dict()["state"].items():
            state |= {f"optimizer.{number}.{name}": value for name, value in moments.items()}
        return {name: value.detach().cpu().clone() for name, value in state.items()}

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
