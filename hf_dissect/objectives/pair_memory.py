"""A memory of the latest pairs that an objective trusts, and its search for near ones."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F


class PairMemory:
    """Ring of the latest trusted pairs: a caption and an image as vectors, and the trust in the pair.

    A pair is there once, as it was last seen: its older entry leaves when the pair is seen again, also if it is not
    trusted any more. Every rank has the same memory, because every rank adds the pairs of all ranks.

    Args:
        size: Number of entries, at least 1.

    Attributes:
        captions: Caption vectors of unit length `(size, D)`.
        images: Image vectors `(size, F)`.
        trust: Trust in the pairs `(size,)`; 0 where there is none.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.captions = torch.zeros(size, 0)
        self.images = torch.zeros(size, 0)
        self.trust = torch.zeros(size)
        self._keys = torch.full((2, size), -1)  # ids of pairs and keys of images
        self._next = 0

    @property
    def count(self) -> int:
        """Number of pairs."""
        return int((self.trust > 0).sum())

    def add(
        self,
        captions: torch.Tensor,
        images: torch.Tensor,
        trust: torch.Tensor,
        keys: torch.Tensor,
        is_trusted: torch.Tensor,
    ) -> None:
        """Add the trusted ones of some pairs, and remove the older entries of all of them.

        Args:
            captions: Caption vectors `(n, D)`.
            images: Image vectors `(n, F)`.
            trust: Trust in the pairs `(n,)`, above 0 for those to add.
            keys: Id of each pair and key of its image, int64 `(2, n)`.
            is_trusted: Bool `(n,)`, True for the pairs to add.
        """
        if self.captions.shape[1] != captions.shape[1] or self.images.shape[1] != images.shape[1]:
            self.captions = captions.new_zeros(self.size, captions.shape[1])
            self.images = images.new_zeros(self.size, images.shape[1])
            self.trust, self._keys = trust.new_zeros(self.size), keys.new_full((2, self.size), -1)
        seen = torch.isin(self._keys[0], keys[0])
        self.trust[seen], self._keys[:, seen] = 0, -1
        (new,) = is_trusted.nonzero(as_tuple=True)
        new = new[-self.size :]
        places = (torch.arange(len(new), device=new.device) + self._next) % self.size
        self.captions[places], self.images[places] = captions[new], images[new]
        self.trust[places], self._keys[:, places] = trust[new], keys[:, new]
        self._next = (self._next + len(new)) % self.size

    def find_images(self, captions: torch.Tensor, keys: torch.Tensor, number: int) -> torch.Tensor:
        """Find what the images of near captions have in common.

        Args:
            captions: Caption vectors of unit length `(r, D)`.
            keys: Id of each pair and key of its image, int64 `(2, r)`; entries that share either do not count.
            number: Number of entries to take for each caption.

        Returns:
            Sums of the centred image vectors of the nearest entries, weighted by their trust, of unit length `(r, F)`.
        """
        similarity = captions @ self.captions.T
        return self._average(similarity, self.center(self.images), keys, number)

    def find_captions(self, images: torch.Tensor, keys: torch.Tensor, number: int) -> torch.Tensor:
        """Find what the captions of near images have in common; the mirror of `find_images`.

        Args:
            images: Centred image vectors of unit length `(r, F)`, see `center`.
            keys: Id of each pair and key of its image, int64 `(2, r)`.
            number: Number of entries to take for each image.

        Returns:
            Sums of the caption vectors of the nearest entries, weighted by their trust, of unit length `(r, D)`.
        """
        similarity = images @ self.center(self.images).T
        return self._average(similarity, self.captions, keys, number)

    def center(self, images: torch.Tensor) -> torch.Tensor:
        """Subtract the mean image vector of the memory from image vectors `(n, F)`, and scale to unit length."""
        known = (self.trust > 0).to(self.images)
        return F.normalize(images - known @ self.images / known.sum().clamp_min(1), dim=-1)

    def _average(
        self, similarity: torch.Tensor, vectors: torch.Tensor, keys: torch.Tensor, number: int
    ) -> torch.Tensor:
        same = (keys[0, :, None] == self._keys[0]) | (keys[1, :, None] == self._keys[1])
        similarity = similarity.masked_fill(same | (self.trust == 0), -torch.inf)
        nearest = similarity.topk(min(number, self.size), dim=1)
        weights = torch.where(nearest.values == -torch.inf, 0, self.trust[nearest.indices])
        return F.normalize((weights[:, None] @ vectors[nearest.indices])[:, 0], dim=-1)

    def state_dict(self) -> dict[str, Any]:
        """Return the entries and the next place."""
        return {
            "captions": self.captions,
            "images": self.images,
            "trust": self.trust,
            "keys": self._keys,
            "next": self._next,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with saved entries; where there is no room for all of them, the oldest leave."""
        saved = len(state["trust"])
        places = torch.arange(saved)
        if saved != self.size:
            places = ((places + state["next"]) % saved)[-self.size :]  # the oldest first
        missing = self.size - len(places)
        self.captions, self.images = (
            F.pad(state[name][places], (0, 0, 0, missing)).clone() for name in ("captions", "images")
        )
        self.trust = F.pad(state["trust"][places], (0, missing)).clone()
        self._keys = F.pad(state["keys"][:, places], (0, missing), value=-1).clone()
        self._next = state["next"] if saved == self.size else len(places) % self.size
