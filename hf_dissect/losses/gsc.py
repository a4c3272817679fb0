"""GSC: a contrastive loss that trusts each pair as far as its geometry agrees with that of the others."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from hf_dissect.distributed import gather_last_dimension, gather_with_grad, get_rank_and_world_size
from hf_dissect.losses.contrastive import MAX_LOGITS
from hf_dissect.losses.logit_rows import compute_losses_in_blocks, promote_to_float32, softmax_losses

logger = logging.getLogger(__name__)

Agreement = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
"""Function from the cross-entropies of the own pairs in both directions, `(b,)` each without gradient, and the number
of pairs that they were found among, to the cross-modal agreement of the pairs `(b,)` in [0, 1]."""

WITHOUT_SIGNAL = 0.01
"""The label below which a pair contributes almost no gradient."""


def average_probabilities(of_texts: torch.Tensor, of_images: torch.Tensor, count: int) -> torch.Tensor:
    """Compute the agreement of the paper: the softmax probability of the true pair, mean of both directions."""
    return (of_texts.neg().exp() + of_images.neg().exp()) / 2


class GscLoss:
    """Loss of geometrical structure consistency (CVPR 2024, arXiv 2405.16996) over the pairs of all ranks.

    With images `I_i`, texts `T_i` and soft labels `y_i` of all `N` pairs, the parts are:

    - cross-modal: the cross-entropy of the true pair at a fixed temperature, mean of the two directions;
    - intra-modal: `-log softmax_j(G_ij)_ii` with `G = A_img A_txt^T`, where `A_img_ij = (I_i . I_j) y_j` and likewise
      `A_txt_ij` are the structures within the modalities. Because `G_ij = I_i M T_j` with
      `M = sum_k y_k^2 I_k T_k^T`, the structures are never held in memory.

    The loss is the mean of `y_i * (cross-modal + gamma * intra-modal)`. Each rank computes the rows of its own pairs.
    The mean over ranks, which DDP takes of the gradients, is the loss of the union of the batches.

    Args:
        gamma: Weight of the intra-modal part, at least 0.
        temperature: Temperature of the cross-modal similarities, above 0; the model's own scale gets no gradient.
        max_logits: Largest number of logits in a block of rows. If there is more than one block, the backward pass
            computes each block again.

    Raises:
        ValueError: If an argument is outside of its range.
    """

    def __init__(self, gamma: float = 0.01, temperature: float = 0.07, max_logits: int = MAX_LOGITS) -> None:
        if not 0 <= gamma < float("inf"):
            raise ValueError(f"gamma={gamma}: the weight of the intra-modal loss must be at least 0 and finite.")
        check_temperature(temperature)
        self.gamma = gamma
        self.temperature = temperature
        self.max_logits = max_logits
        self._has_warned = False

    def __call__(self, image_embeds: torch.Tensor, text_embeds: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Compute the loss of one batch of `b` pairs per rank, equally many on every rank.

        Args:
            image_embeds: Embeddings `(b, D)` of unit length; half precision is promoted to single.
            text_embeds: Embeddings `(b, D)` of unit length.
            labels: Soft labels `(b,)` in [0, 1], without gradient, on any device.

        Returns:
            A scalar with gradient.

        Raises:
            ValueError: If the number of labels is not that of the pairs.
        """
        self._warn_if_signal_is_lost(labels)
        pairs = _Pairs.of_all_ranks(image_embeds, text_embeds, labels)
        return self._combine(pairs, pairs.cross_modal(self.temperature, self.max_logits))

    def with_evidence(
        self,
        image_embeds: torch.Tensor,
        text_embeds: torch.Tensor,
        labels: torch.Tensor,
        agreement: Agreement = average_probabilities,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Compute the loss and, at little more cost, the evidence for the next labels.

        Args:
            image_embeds: Embeddings `(b, D)` of unit length.
            text_embeds: Embeddings `(b, D)` of unit length.
            labels: Soft labels `(b,)` in [0, 1].
            agreement: Function that computes the agreement; that of the paper by default.

        Returns:
            The loss as in `__call__`, and the evidence as in `gsc_evidence`.
        """
        self._warn_if_signal_is_lost(labels)
        pairs = _Pairs.of_all_ranks(image_embeds, text_embeds, labels)
        cross_modal = pairs.cross_modal(self.temperature, self.max_logits)
        return self._combine(pairs, cross_modal), _compute_evidence(pairs, cross_modal, agreement)

    def _combine(self, pairs: "_Pairs", cross_modal: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        losses = (cross_modal[0] + cross_modal[1]) / 2
        if self.gamma:
            losses = losses + self.gamma * pairs.intra_modal(self.max_logits)
        return (pairs.labels * losses).mean()

    def _warn_if_signal_is_lost(self, labels: torch.Tensor) -> None:
        if not self._has_warned and len(labels) and labels.max() < WITHOUT_SIGNAL:
            self._has_warned = True
            logger.warning(
                "All %d soft labels of a batch are below %g: it contributes almost no gradient.",
                len(labels),
                WITHOUT_SIGNAL,
            )


@torch.no_grad()
def gsc_evidence(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: float = 0.07,
    across_ranks: bool = True,
    agreement: Agreement = average_probabilities,
) -> dict[str, torch.Tensor]:
    """Measure how far the geometry of a batch supports each pair, for the next soft labels (see `SoftLabels`).

    Args:
        image_embeds: Embeddings `(b, D)` of unit length; with several ranks equally many on each.
        text_embeds: Embeddings `(b, D)` of unit length.
        labels: Soft labels `(b,)` in [0, 1], which mask the structures within the modalities.
        temperature: Temperature of the softmax, above 0.
        across_ranks: True to compare with the pairs of all ranks, False with those of this rank only.
        agreement: Function that computes the agreement; that of the paper by default.

    Returns:
        Tensors `(b,)` in at least single precision on the CPU: `agreement`, by default the softmax probability of the
        true pair, mean of the two directions; `structure`, the cosine of the pair's rows `A_img_i` and `A_txt_i`.

    Raises:
        ValueError: If the number of labels is not that of the pairs, or the temperature is not above 0.
    """
    check_temperature(temperature)
    gathered = _Pairs.of_all_ranks if across_ranks else _Pairs.of_this_rank
    pairs = gathered(image_embeds, text_embeds, labels)
    return _compute_evidence(pairs, pairs.cross_modal(temperature, MAX_LOGITS), agreement)


@torch.no_grad()
def _compute_evidence(
    pairs: "_Pairs", cross_modal: tuple[torch.Tensor, torch.Tensor], agreement: Agreement
) -> dict[str, torch.Tensor]:
    agreements = agreement(*cross_modal, len(pairs.all_texts))
    return {"agreement": agreements.cpu(), "structure": pairs.structure_cosines().cpu()}


@dataclass(frozen=True)
class _Pairs:
    """The `b` pairs of this rank among the `N` pairs that they are compared with.

    Args:
        images: Embeddings `(b, D)`.
        texts: Embeddings `(b, D)`.
        labels: Soft labels `(b,)`.
        all_images: Embeddings `(N, D)`.
        all_texts: Embeddings `(N, D)`.
        all_labels: Soft labels `(N,)`.
        first: Position of this rank's first pair among the `N`.
    """

    images: torch.Tensor
    texts: torch.Tensor
    labels: torch.Tensor
    all_images: torch.Tensor
    all_texts: torch.Tensor
    all_labels: torch.Tensor
    first: int

    @classmethod
    def of_this_rank(cls, image_embeds: torch.Tensor, text_embeds: torch.Tensor, labels: torch.Tensor) -> "_Pairs":
        """Compare the pairs of this rank with each other."""
        if labels.shape != image_embeds.shape[:1]:
            raise ValueError(
                f"labels of shape {tuple(labels.shape)} for {len(image_embeds)} pairs; give one per pair."
            )
        images, texts = promote_to_float32(image_embeds), promote_to_float32(text_embeds)
        own = images, texts, labels.detach().to(images)
        return cls(*own, *own, first=0)

    @classmethod
    def of_all_ranks(cls, image_embeds: torch.Tensor, text_embeds: torch.Tensor, labels: torch.Tensor) -> "_Pairs":
        """Compare the pairs of this rank with those of all ranks."""
        own = cls.of_this_rank(image_embeds, text_embeds, labels)
        return cls(
            *(own.images, own.texts, own.labels),
            *(gather_with_grad(own.images), gather_with_grad(own.texts), gather_last_dimension(own.labels[None])[0]),
            first=get_rank_and_world_size()[0] * len(own.images),
        )

    def cross_modal(self, temperature: float, max_logits: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the cross-entropies `(b,)` of the texts among the images and of the images among the texts."""
        scale = 1 / temperature
        if self.all_texts is self.texts and len(self.texts) ** 2 <= max_logits:  # one product for both directions
            with self._full_precision():
                logits = (self.texts * scale) @ self.images.T
            return softmax_losses(logits, 0, None), softmax_losses(logits.t(), 0, None)
        return (
            self._losses_of_rows(self.texts * scale, self.all_images, max_logits),
            self._losses_of_rows(self.images * scale, self.all_texts, max_logits),
        )

    @cached_property
    def across(self) -> torch.Tensor:
        """The product `I_i M`, masked by the labels, `(b, D)`; its products with the texts are `G`."""
        with self._full_precision():
            return self.images @ self._moments(self.all_images, self.all_texts)

    def intra_modal(self, max_logits: int) -> torch.Tensor:
        """Compute `-log softmax_j(G_ij)_ii`, `(b,)`."""
        return self._losses_of_rows(self.across, self.all_texts, max_logits)

    def structure_cosines(self) -> torch.Tensor:
        """Compute `cos(A_img_i, A_txt_i)`, `(b,)`."""

        def products(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
            return (rows * columns).sum(-1)

        with self._full_precision():
            of_images = products(self.images @ self._moments(self.all_images, self.all_images), self.images)
            of_texts = products(self.texts @ self._moments(self.all_texts, self.all_texts), self.texts)
        tiny = torch.finfo(of_images.dtype).tiny  # in case all labels vanish
        return products(self.across, self.texts) / of_images.clamp_min(tiny).sqrt() / of_texts.clamp_min(tiny).sqrt()

    def _moments(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Compute `sum_k y_k^2 a_k b_k^T` from `(N, D)`, the matrix between the rows of two structures."""
        return (rows * self.all_labels.square()[:, None]).T @ columns

    def _losses_of_rows(self, rows: torch.Tensor, columns: torch.Tensor, max_logits: int) -> torch.Tensor:
        """Compute `-log softmax(rows @ columns.T)` of the true pairs, `(b,)`, in blocks of rows."""

        def losses_of(block: slice) -> torch.Tensor:
            return softmax_losses(rows[block] @ columns.T, self.first + block.start, None)

        with self._full_precision():
            return compute_losses_in_blocks(losses_of, len(rows), len(columns), max_logits)

    def _full_precision(self) -> torch.autocast:
        return torch.autocast(self.images.device.type, enabled=False)


def check_temperature(temperature: float) -> None:
    """Raise a ValueError unless the temperature is above 0 and finite."""
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature={temperature}: must be above 0 and finite.")
