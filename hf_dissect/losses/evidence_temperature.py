"""The temperature at which the similarities of an over-confident model are evidence about its pairs."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from hf_dissect.losses.logit_rows import (
    exclude_negatives,
    promote_to_float32,
    smoothed_softmax_losses,
    softmax_losses,
)

GRID = tuple(2 ** (-power / 2) for power in range(13))
SAMPLE = 64
"""Largest number of pairs of all ranks that are measured at every temperature of the grid."""
COLUMNS = (*(f"evidence_at_{temperature:.4f}" for temperature in GRID), "variance")


class EvidenceTemperature:
    """Factor `tau` of the logits, at most 1, with which the losses of pairs are evidence.

    A model that starts with a large logit scale and no knowledge is sure of its errors: hardly any pair fits, so that
    none had a weight. Its logits times `tau` are those of a higher temperature,

        tau = min(1, max(2 tau_ML, 2.5 / sigma)).

    `sigma` is the standard deviation of the logits within rows and columns, of the last step. `tau_ML` is the factor
    of the grid with the largest likelihood `mean log(pi_t n q_t + 1 - pi_t)`, a moving average over the steps, where
    each factor `t` has its own share `pi_t`, the moving average of its posteriors. Of factors that are within 0.002 of
    it, the largest is taken, since the likelihoods are those of a sample. The likelihood alone would take too small a
    factor, because the model learns from the pairs that it judges. A model that knows its pairs, or one with a usual
    logit scale, has `tau = 1`, which changes nothing.

    Attributes:
        value: `tau`, which stays the same within an optimiser step.
    """

    KEPT = 0.95
    FACTOR = 2.0
    SPREAD = 2.5
    TOLERANCE = 0.002
    LOWEST, HIGHEST = 0.05, 0.999

    def __init__(self) -> None:
        self.value = 1.0
        self._lowest = 1.0
        self._shares = torch.full((len(GRID),), 0.5, dtype=torch.float64)
        self._likelihoods = torch.zeros(len(GRID), dtype=torch.float64)
        self._sums = torch.zeros(2 * len(GRID) + 2, dtype=torch.float64)

    def observe(self, columns: Mapping[str, torch.Tensor]) -> None:
        """Take in what was measured of the pairs of all ranks, `(n,)` by the names of COLUMNS, NaN for the others."""
        self.observe_sums(self.summarize(columns))

    def summarize(self, columns: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return sums over measured pairs, float64 `(m,)`, which can be added to those of other ranks.

        Args:
            columns: Columns `(n,)` by the names of COLUMNS, NaN for pairs outside the sample; without them, nothing
                was measured.
        """
        if COLUMNS[0] not in columns:
            return torch.zeros_like(self._sums)
        measured = torch.stack([columns[name].double().cpu() for name in COLUMNS], dim=1)
        measured = measured[~measured[:, 0].isnan()]
        log_odds = torch.logit(self._shares) + measured[:, :-1]
        likelihoods = F.softplus(log_odds) + torch.log1p(-self._shares)
        sums = torch.cat([likelihoods.sum(0), torch.sigmoid(log_odds).sum(0), measured[:, -1].sum()[None]])
        return torch.cat([sums, torch.tensor([len(measured)], dtype=torch.float64)])

    def observe_sums(self, sums: torch.Tensor) -> None:
        """Take in what `summarize` returned, or the sum of that over all ranks, on every rank."""
        self._sums += sums

    def begin_step(self) -> None:
        """Move the averages and `tau` by what was observed since the last optimiser step began."""
        count = self._sums[-1].item()
        if count:
            likelihoods, shares = (self._sums[:-2] / count).split(len(GRID))
            self._likelihoods = torch.lerp(likelihoods, self._likelihoods, self.KEPT)
            self._shares = torch.lerp(shares, self._shares, self.KEPT).clamp(self.LOWEST, self.HIGHEST)
            likely = self._likelihoods >= self._likelihoods.max() - self.TOLERANCE
            likeliest = GRID[int(likely.nonzero()[0])]
            sigma = math.sqrt(max(self._sums[-2].item() / count, 1e-12))
            self.value = min(1.0, max(self.FACTOR * likeliest, self.SPREAD / sigma))
            self._lowest = min(self._lowest, self.value)
        self._sums.zero_()

    def pop_lowest(self) -> float:
        """Return the smallest `tau` since the last call."""
        lowest, self._lowest = self._lowest, self.value
        return lowest

    def state_dict(self) -> dict[str, Any]:
        """Return the averages, what was observed in the current step, and the values of `tau`."""
        averages = {"shares": self._shares, "likelihoods": self._likelihoods, "sums": self._sums}
        return {"value": self.value, "lowest": self._lowest} | {name: own.tolist() for name, own in averages.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
        self.value, self._lowest = float(state["value"]), float(state["lowest"])
        self._shares, self._likelihoods, self._sums = (
            torch.tensor(state[name], dtype=torch.float64) for name in ("shares", "likelihoods", "sums")
        )


class TemperedLosses:
    """Loss of rows of logits whose evidence is taken at a temperature, and the measurement of a sample of the rows.

    It is made for one batch, of which the contrastive loss computes the rows of texts before those of images.

    Args:
        temperature: Factor `tau` of the logits in the evidence.
        smoothing: Share of the targets that is uniform over the columns, see `smoothed_softmax_losses`.
    """

    def __init__(self, temperature: float, smoothing: float = 0.0) -> None:
        self.temperature = temperature
        self.smoothing = smoothing
        self._measured: list[torch.Tensor] | None = []

    def __call__(self, logits: torch.Tensor, first: int, mask: torch.Tensor | None) -> torch.Tensor:
        """Return the losses to train on and the losses at the temperature, `(r, 2)`; see `softmax_losses`."""
        losses = smoothed_softmax_losses(logits, first, mask, self.smoothing)
        with torch.no_grad():
            if self._measured is not None:
                self._measured.append(measure_rows(logits, first, mask))
            if self.temperature == 1:
                return losses
            tempered = softmax_losses(promote_to_float32(logits) * self.temperature, first, mask)
        return torch.stack([losses[:, 0], tempered], dim=1)

    def pop_columns(self, counts: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return what was measured of the `b` pairs, and measure no more, so that a backward pass can compute again.

        Args:
            counts: Number of pairs that each was found among, itself included, `(b,)`.

        Returns:
            Evidence `log(n q)` at each temperature and variance of the logits, by the names of COLUMNS, float32
            `(b,)`; NaN for pairs outside the sample.
        """
        of_texts, of_images = torch.cat(self._measured or []).chunk(2)
        self._measured = None
        return make_columns((of_texts + of_images) / 2, counts)


def measure_rows(logits: torch.Tensor, first: int, mask: torch.Tensor | None) -> torch.Tensor:
    """Measure a sample of rows: their cross-entropy at each temperature of the grid, and the variance of their logits.

    The sample is evenly spaced over the pairs of all ranks, so that it is the same for any number of ranks.

    Args:
        logits: Logits `(r, c)`; the true pair of row `i` is in column `first + i`.
        first: Column of the first row's true pair.
        mask: Bool `(r, c)`, True where a column is not a negative of the row; None for nowhere.

    Returns:
        Losses and variance `(r, len(GRID) + 1)` without gradient, NaN for rows outside the sample.
    """
    rows = _choose_sample(logits.shape[1], first)
    labels = torch.arange(first, first + len(logits), device=logits.device)[rows]
    sample = _measure(logits.detach()[rows], labels, None if mask is None else mask[rows])
    return sample.new_full((len(logits), len(COLUMNS)), torch.nan).index_put_((labels - first,), sample)


@torch.no_grad()
def measure_pairs(
    image_embeds: torch.Tensor, text_embeds: torch.Tensor, scale: torch.Tensor | float
) -> dict[str, torch.Tensor]:
    """Measure a sample of pairs among all of them, as `TemperedLosses` does, without the logits of the others.

    Args:
        image_embeds: Embeddings `(n, D)` of unit length.
        text_embeds: Embeddings `(n, D)` of unit length.
        scale: Factor from cosines to logits.

    Returns:
        Columns `(n,)` by the names of COLUMNS, on the CPU; see `TemperedLosses.pop_columns`.
    """
    number = len(image_embeds)
    labels = torch.arange(number, device=image_embeds.device)[_choose_sample(number, 0)]
    of_texts, of_images = (
        _measure(own[labels] @ other.T * scale, labels, None)
        for own, other in ((text_embeds, image_embeds), (image_embeds, text_embeds))
    )
    sample = (of_texts + of_images) / 2
    measured = torch.full((number, len(COLUMNS)), torch.nan).index_put_((labels.cpu(),), sample.float().cpu())
    return make_columns(measured, number)


def make_columns(measured: torch.Tensor, counts: torch.Tensor | int) -> dict[str, torch.Tensor]:
    """Convert measured losses and variances `(b, len(GRID) + 1)` to columns, see `TemperedLosses.pop_columns`."""
    log_counts = torch.as_tensor(counts, dtype=measured.dtype, device=measured.device).log()
    evidence = log_counts.reshape(-1, 1) - measured[:, :-1]
    return dict(zip(COLUMNS, (*evidence.float().T, measured[:, -1].float()), strict=True))


def _choose_sample(number: int, first: int) -> slice:
    """Return the rows of the sample among rows that begin with number `first` of all."""
    spacing = -(-number // SAMPLE)
    return slice(-first % spacing, None, spacing)


def _measure(logits: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    logits = promote_to_float32(logits)
    logits = logits - logits.gather(1, labels[:, None])
    if mask is None:
        variance = (logits - logits.mean(1, keepdim=True)).square().mean(1)
    else:
        excluded = exclude_negatives(mask, labels)
        counts = (~excluded).sum(1)
        mean = logits.masked_fill(excluded, 0).sum(1) / counts
        variance = (logits - mean[:, None]).masked_fill(excluded, 0).square().sum(1) / counts
        logits = logits.masked_fill(excluded, -torch.inf)
    return torch.stack([*((logits * factor).logsumexp(1) for factor in GRID), variance], dim=1)
