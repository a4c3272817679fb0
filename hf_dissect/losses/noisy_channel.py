"""The noisy channel: weights of pairs from their contrastive losses and an estimated share of mismatched pairs."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F

from hf_dissect.losses.evidence_temperature import EvidenceTemperature
from hf_dissect.losses.logit_rows import promote_to_float32
from hf_dissect.losses.pair_evidence import compute_pair_evidence


class NoisyChannel:
    """Estimate of the share `pi` of matched pairs, and the posterior probability of each pair to be one of them.

    The caption of a pair is, with probability `pi`, the one that belongs to its image, and otherwise any of the `n` of
    the batch. The softmax over the batch gives the pair the probability `q = exp(-loss)`, so that it is matched with

        P = pi q / (pi q + (1 - pi) / n) = sigmoid(logit(pi) + log n - loss).

    This is the two-groups model of Efron (Empirical Bayes Analysis of a Microarray Experiment, 2001), whose null is
    known by construction. Pairs are weighted by `P ** 2`, because a network can learn mismatched pairs by heart: their
    losses have full gradients, and those of learnt matched pairs next to none.

    Where the model trains with smoothed targets, the smoothing makes all pairs a little alike. It is taken out of the
    losses again: with the share `eps`, `n q = (1 - eps) r + eps` gives the density ratio `r`, and where `n q` is below
    `2 eps`, the line through 0 continues it.

    Args:
        smoothing: Share of the targets in training that is uniform over the pairs, in [0, 1).

    Attributes:
        pi: Estimated share of matched pairs. It begins at 1/2, moves by 2 % towards the mean posterior of the pairs of
            each optimiser step, and stays within [0.05, 0.999].
        temperature: `EvidenceTemperature` that the losses are to be taken at.
    """

    START = 0.5
    SHARE_OF_STEP = 0.02
    LOWEST, HIGHEST = 0.05, 0.999
    POWER = 2

    def __init__(self, smoothing: float = 0.0) -> None:
        self.smoothing = smoothing
        self.pi = self.START
        self.temperature = EvidenceTemperature()
        self._sum = 0.0
        self._count = 0

    def correct(self, losses: torch.Tensor, counts: torch.Tensor | int) -> torch.Tensor:
        """Take the smoothing of the targets out of losses.

        Args:
            losses: Contrastive losses of the pairs, `-log q`, mean of both directions, `(b,)`.
            counts: Number `n` of pairs that each was found among, itself included, `(b,)` or one for all.

        Returns:
            Losses `(b,)` without gradient, in at least single precision.
        """
        losses = promote_to_float32(losses.detach())
        if not self.smoothing:
            return losses
        log_counts = torch.as_tensor(counts, dtype=losses.dtype, device=losses.device).log()
        log_ratio, smoothing = log_counts - losses, self.smoothing
        ratio = log_ratio.exp().clamp_min(2 * smoothing)
        above = ((ratio - smoothing) / (1 - smoothing)).log()
        below = log_ratio - math.log(2 * (1 - smoothing))
        return (log_counts - torch.where(log_ratio > math.log(2 * smoothing), above, below)).clamp_min(0)

    def posterior(self, losses: torch.Tensor, counts: torch.Tensor | int) -> torch.Tensor:
        """Compute the probability of each pair to be matched.

        Args:
            losses: Contrastive losses of the pairs, `-log q`, mean of both directions, `(b,)`.
            counts: Number `n` of pairs that each was found among, itself included, `(b,)` or one for all.

        Returns:
            Probabilities `(b,)` without gradient, in at least single precision.
        """
        losses = promote_to_float32(losses.detach())
        log_counts = torch.as_tensor(counts, dtype=losses.dtype, device=losses.device).log()
        return torch.sigmoid(self._logit() + log_counts - losses)

    def posterior_of_evidence(self, evidence: torch.Tensor) -> torch.Tensor:
        """Compute the probability of each pair to be matched from its evidence `(b,)`, as among very many pairs."""
        return torch.sigmoid(self._logit() + evidence)

    def weigh(self, posterior: torch.Tensor) -> torch.Tensor:
        """Compute the weights of the losses of pairs from their posterior probabilities `(b,)`."""
        return posterior**self.POWER

    def observe(self, posterior: torch.Tensor) -> None:
        """Take in posterior probabilities `(n,)` of pairs of the current step, those of all ranks on every rank."""
        self.observe_sums(self.summarize(posterior))

    def summarize(
        self, posterior: torch.Tensor, columns: Mapping[str, torch.Tensor] = MappingProxyType({})
    ) -> torch.Tensor:
        """Return sums over pairs, float64 `(m,)`, which can be added to those over the pairs of other ranks.

        Args:
            posterior: Posterior probabilities of the pairs, `(n,)`.
            columns: What was measured of them for `EvidenceTemperature.summarize`.
        """
        own = torch.tensor([posterior.detach().cpu().double().sum().item(), len(posterior)], dtype=torch.float64)
        return torch.cat([own, self.temperature.summarize(columns)])

    def observe_sums(self, sums: torch.Tensor) -> None:
        """Take in what `summarize` returned, or the sum of that over all ranks, on every rank."""
        self._sum += sums[0].item()
        self._count += round(sums[1].item())
        self.temperature.observe_sums(sums[2:])

    def begin_step(self) -> None:
        """Move `pi` and the temperature by what was observed since the last optimiser step began."""
        self.temperature.begin_step()
        if self._count:
            moved = (1 - self.SHARE_OF_STEP) * self.pi + self.SHARE_OF_STEP * self._sum / self._count
            self.pi = min(max(moved, self.LOWEST), self.HIGHEST)
        self._sum, self._count = 0.0, 0

    def compute_figures(self) -> dict[str, float]:
        """Return the estimated share of mismatched pairs as `estimated_mismatched`."""
        return {"estimated_mismatched": 1 - self.pi}

    def pop_logs(self) -> dict[str, float]:
        """Return the figures as `selection_*`, for the logs of training, and a temperature that was below 1."""
        figures, lowest = self.compute_figures(), self.temperature.pop_lowest()
        if lowest < 1:
            figures["evidence_temperature"] = lowest
        return {f"selection_{name}": value for name, value in figures.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the share, what was observed in the current step, and the temperature."""
        own = {"pi": self.pi, "sum": self._sum, "count": self._count}
        return own | {"temperature": self.temperature.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
        self.pi, self._sum, self._count = float(state["pi"]), float(state["sum"]), int(state["count"])
        if "temperature" in state:  # earlier versions had none
            self.temperature.load_state_dict(state["temperature"])

    def _logit(self) -> float:
        return math.log(self.pi / (1 - self.pi))


def compute_bounded_loss(losses: torch.Tensor, counts: torch.Tensor | int, pi: float) -> torch.Tensor:
    """Compute the loss whose gradient in the contrastive loss `l` is `P ** 2`, without weights.

    With `t = log n + logit(pi)` it is `sigmoid(t - l) - softplus(t - l)`, which is bounded from above: a pair that
    does not fit costs no more the less it fits.

    Args:
        losses: Contrastive losses of the pairs `(b,)`.
        counts: Number `n` of pairs that each was found among, `(b,)` or one for all.
        pi: Share of matched pairs, in (0, 1).

    Returns:
        Losses `(b,)` with gradient.
    """
    log_counts = torch.as_tensor(counts, dtype=losses.dtype, device=losses.device).log()
    margin = math.log(pi / (1 - pi)) + log_counts - losses
    return torch.sigmoid(margin) - F.softplus(margin)


def find_evidence(losses: torch.Tensor, counts: torch.Tensor | int) -> torch.Tensor:
    """Compute the evidence of pairs for a ledger, see `compute_pair_evidence`; NaN for a pair without a stranger."""
    losses = promote_to_float32(losses.detach())
    counts = torch.as_tensor(counts, device=losses.device).expand(losses.shape)
    return torch.where(counts > 1, compute_pair_evidence(losses, counts), torch.nan).float()


def estimate_matches(evidence: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Estimate which pairs are matched, and how many, from evidence that a run left in its ledger.

    The evidence is the log of the density ratio among many pairs. The share of matched pairs is that of the largest
    likelihood.

    Args:
        evidence: Evidence of the pairs `(n,)`, NaN for unknown pairs.

    Returns:
        Posterior probabilities `(n,)`, NaN for unknown pairs, and the share of matched pairs.
    """
    known = evidence[~evidence.isnan()].double()
    pi = NoisyChannel.START
    for _ in range(500):
        if not len(known):
            break
        moved = torch.sigmoid(known + math.log(pi / (1 - pi))).mean().item()
        moved = min(max(moved, NoisyChannel.LOWEST), NoisyChannel.HIGHEST)
        pi, change = moved, abs(moved - pi)
        if change < 1e-7:
            break
    return torch.sigmoid(evidence + math.log(pi / (1 - pi))), pi
