"""The adapted form of `torch.nn.Conv2d`."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from hf_dissect.mola.layer import LAYERS, MolaLayer


class Conv2d(MolaLayer):
    """MoLA in a convolution of any kernel, stride, padding, dilation and number of groups.

    The weight of a convolution, read as a matrix, is `(out, in / groups * height * width)`. The experts add `B A` to
    this matrix, so every group is reduced by the same `A`.
    """

    def _expert_shape(self) -> tuple[tuple[int, ...], int]:
        weight = self._get_convolution().weight
        return tuple(weight.shape[1:]), weight.shape[0]

    def _as_weight(self, delta: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
        return delta.reshape(len(delta), *A.shape[1:])

    def _get_convolution(self) -> nn.Conv2d:
        return cast(nn.Conv2d, self.get_base_layer())

    def _convolve(self, x: torch.Tensor, weight: torch.Tensor, groups: int) -> torch.Tensor:
        """Convolve as the base layer does, with another weight and number of groups."""
        base_layer = self._get_convolution()
        options: tuple[Any, ...] = (base_layer.stride, base_layer.padding, base_layer.dilation, groups)
        if base_layer.padding_mode != "zeros":
            x = F.pad(x, base_layer._reversed_padding_repeated_twice, mode=base_layer.padding_mode)
            options = (base_layer.stride, 0, base_layer.dilation, groups)
        return F.conv2d(x, weight, None, *options)

    def _down(self, x: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
        groups = self._get_convolution().groups
        return self._convolve(x, A.repeat(groups, 1, 1, 1), groups)

    def _up(self, hidden: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        return F.conv2d(hidden, B[:, :, None, None], groups=self._get_convolution().groups)

    def _up_by_sample(self, hidden: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        """Multiply `(S, groups * r, height, width)` by the matrix `(S, out, r)` of each sample."""
        groups = self._get_convolution().groups
        output = B.reshape(len(B) * groups, -1, B.shape[2]) @ hidden.reshape(len(B) * groups, B.shape[2], -1)
        return output.view(len(B), -1, *hidden.shape[2:])

    def _mix_tasks(
        self, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, tasks: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        # One convolution, in which the channels of each sample are groups of their own.
        groups = self._get_convolution().groups
        tasks = tasks.repeat_interleave(len(x) // len(tasks))
        A = A.index_select(0, tasks)[:, None].expand(-1, groups, -1, -1, -1, -1)
        hidden = self._convolve(x.reshape(1, -1, *x.shape[2:]), A.flatten(0, 2), len(x) * groups)
        hidden = hidden.reshape(len(x), -1, *hidden.shape[2:])
        return self._up_by_sample(hidden, B.index_select(0, tasks) * scaling)

    def _mix_all(self, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        hidden = self._down(x, A.flatten(0, 1))
        weights = weights.to(hidden).repeat_interleave(len(x) // len(weights), dim=0)
        weights = weights.repeat_interleave(A.shape[1], dim=1)
        B = B.transpose(0, 1).flatten(1)
        if hidden.shape[2:].numel() > len(B):  # the smaller of the two factors is weighted
            return self._up_by_sample(hidden, weights[:, None] * B)
        return self._up(hidden * weights.repeat(1, self._get_convolution().groups)[:, :, None, None], B)


LAYERS[nn.Conv2d] = Conv2d
