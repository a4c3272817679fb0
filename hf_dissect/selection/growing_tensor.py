"""A long tensor that grows without being copied, so that no training step waits for a copy."""

from collections.abc import Iterator

import numpy as np
import torch

_SEGMENT_BITS = 24
SEGMENT = 2**_SEGMENT_BITS


class GrowingTensor:
    """One-dimensional tensor in segments, whose values are never moved.

    A segment takes memory as it is written to, not when it is allocated.

    Args:
        dtype: NumPy type, such as `np.float32`.
    """

    def __init__(self, dtype: type) -> None:
        self._dtype, self._count = dtype, 0
        self._segments: list[torch.Tensor] = []

    def __len__(self) -> int:
        return self._count

    def extend(self, values: torch.Tensor) -> None:
        """Append values `(n,)`."""
        while len(values):
            place = self._count % SEGMENT
            if place == 0:
                self._segments.append(torch.from_numpy(np.empty(SEGMENT, self._dtype)))
            part = values[: SEGMENT - place]
            self._segments[-1][place : place + len(part)] = part
            self._count += len(part)
            values = values[len(part) :]

    def __getitem__(self, places: torch.Tensor) -> torch.Tensor:
        """Return the values `(B,)` at places int64 `(B,)`."""
        if len(self._segments) == 1:
            return self._segments[0][places]
        taken = torch.from_numpy(np.empty(len(places), self._dtype))
        for segment, own, inside in self._by_segment(places):
            taken[own] = segment[inside]
        return taken

    def __setitem__(self, places: torch.Tensor, values: torch.Tensor) -> None:
        """Set the values at places int64 `(B,)`; the last value of a repeated place stays."""
        for segment, own, inside in self._by_segment(places):
            # index_put_ does not define the winner of a repeated index; NumPy assignment does, the last.
            segment.numpy()[inside.numpy()] = values[own].numpy()

    def whole(self) -> torch.Tensor:
        """Return all values, `(len(self),)`, copied if there is more than one segment."""
        if not self._segments:
            return torch.from_numpy(np.empty(0, self._dtype))
        filled = [*self._segments[:-1], self._segments[-1][: self._count - (len(self._segments) - 1) * SEGMENT]]
        return filled[0] if len(filled) == 1 else torch.cat(filled)

    def _by_segment(self, places: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        number = places >> _SEGMENT_BITS
        for index, segment in enumerate(self._segments):
            (own,) = (number == index).nonzero(as_tuple=True)
            if len(own):
                yield segment, own, places[own] & (SEGMENT - 1)
