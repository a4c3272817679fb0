"""Routers: networks that read the model's input and score each expert for each sample."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from hf_dissect.mola.base_model import (
    choose_router_sources,
    find_input_layer,
    find_towers,
    get_num_channels,
    get_output_dim,
    has_fixed_pixels,
)
from hf_dissect.mola.config import MolaConfig, PixelArchitecture

RouterFactory = Callable[[MolaConfig, nn.Module], nn.Module]
_FACTORIES: dict[str, RouterFactory] = {}


def register_router(name: str, factory: RouterFactory) -> None:
    """Make a custom router available as `MolaConfig(router_input=name)`.

    The router must be registered again, under the same name, before an adapter that uses it is loaded.

    Args:
        name: Name that is saved in the adapter's configuration.
        factory: Function of the `MolaConfig` and the base model. It returns a module whose `forward(**inputs)` takes
            the inputs of the model by name and returns scores `(B, num_experts)`.

    Raises:
        ValueError: If `name` is one of the built-in routers.
    """
    if name in ("pixels", "embeddings"):
        raise ValueError(f"name={name!r} is a built-in router; choose another name.")
    _FACTORIES[name] = factory


def check_router_input(router_input: str) -> None:
    """Raise a ValueError unless `router_input` is built in or registered."""
    if router_input not in ("pixels", "embeddings", *_FACTORIES):
        raise ValueError(
            f"router_input={router_input!r}: must be 'pixels', 'embeddings' or a registered name "
            f"({', '.join(map(repr, _FACTORIES)) or 'none so far'}). Register yours with "
            "hf_dissect.mola.register_router before the adapter is created or loaded."
        )


class PixelRouter(nn.Module):
    """A residual network for small images with 16, 32 and 64 channels (arXiv 1512.03385, section 4.2).

    Args:
        num_experts: Number of scores.
        num_channels: Number of channels of the images.
        image_size: Side in pixels to which larger images are reduced first; None to keep their size.
        architecture: `"resnet20"` for the network of the paper, with three blocks for each number of channels, 0.27 M
            parameters; `"resnet8"` for one block each, behind a first convolution that halves the image, 0.07 M.
    """

    def __init__(
        self,
        num_experts: int,
        num_channels: int = 3,
        image_size: int | None = 32,
        architecture: PixelArchitecture = "resnet8",
    ) -> None:
        super().__init__()
        self.num_channels = num_channels
        self.image_size = image_size
        blocks, stride = {"resnet8": (1, 2), "resnet20": (3, 1)}[architecture]
        convolution = nn.Conv2d(num_channels, 16, 3, stride=stride, padding=1, bias=False)
        self.stem = nn.Sequential(convolution, nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        widths = [16] + [16] * blocks + [32] * blocks + [64] * blocks
        self.blocks = nn.Sequential(*(_BasicBlock(*pair) for pair in zip(widths, widths[1:], strict=False)))
        self.scores = nn.Linear(64, num_experts)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Score the experts for each image.

        Args:
            pixel_values: Images `(B, channels, height, width)`.

        Returns:
            Scores `(B, num_experts)`.

        Raises:
            ValueError: If the shape is not that of images with the expected channels.
        """
        if pixel_values.dim() != 4 or pixel_values.shape[1] != self.num_channels:
            raise ValueError(
                f"router_input='pixels' needs pixel_values of shape (B, {self.num_channels}, height, width), got "
                f"{tuple(pixel_values.shape)}; use router_input='embeddings' for other inputs."
            )
        if self.image_size is not None and max(pixel_values.shape[-2:]) > self.image_size:
            pixel_values = F.adaptive_avg_pool2d(pixel_values, self.image_size)
        return self.scores(self.blocks(self.stem(pixel_values)).mean((2, 3)))


class _BasicBlock(nn.Module):
    """A residual block of two 3x3 convolutions, whose shortcut pads the added channels with zeros."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.stride = out_channels // in_channels
        self.padding = out_channels - in_channels
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=self.stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `(B, in, height, width)` to `(B, out, height / stride, width / stride)`."""
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.padding))
        return F.relu_(shortcut + self.norm2(self.conv2(F.relu_(self.norm1(self.conv1(x))))))


class EmbeddingRouter(nn.Module):
    """A perceptron with one hidden layer of 64 units on the pooled output of the model's input layer.

    Args:
        num_experts: Number of scores.
        dim: Number of dimensions of the embeddings.
    """

    def __init__(self, num_experts: int, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.hidden = nn.Linear(dim, 64)
        self.scores = nn.Linear(64, num_experts)

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        """Score the experts for each sample.

        Args:
            pooled: Mean embeddings of the samples, `(B, dim)`.

        Returns:
            Scores `(B, num_experts)`.
        """
        return self.scores(F.gelu(self.hidden(self.norm(pooled))))


class Router(nn.Module):
    """The router of an adapter, with one branch for each tower.

    Args:
        branches: Network of each tower; a single network for all towers is named `"all"`.
        config: Configuration of the adapter.
    """

    def __init__(self, branches: dict[str, nn.Module], config: MolaConfig) -> None:
        super().__init__()
        self.branches = nn.ModuleDict(branches)
        self.projection: nn.Linear | None = None
        if config.decorrelation_weight:
            self.projection = nn.Linear(config.num_experts, config.decorrelation_dim, bias=False)

    def forward(self, tower: str, **inputs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Score the experts by the input of one tower.

        Args:
            tower: Name of the branch.
            **inputs: Inputs of its network; floating-point tensors are cast to the type of the router.

        Returns:
            Scores `(B, E)` and their projection `(B, decorrelation_dim)`; None instead of the latter without
            decorrelation.
        """
        dtype = next(self.parameters()).dtype
        inputs = {
            name: value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value
            for name, value in inputs.items()
        }
        scores = self.branches[tower](**inputs)
        return scores, None if self.projection is None else self.projection(scores)


def build_router(config: MolaConfig, model: nn.Module) -> Router:
    """Build the router of an adapter, and set `router_input` in its configuration if it is None.

    Args:
        config: Configuration of the adapter.
        model: Base model.

    Returns:
        The router, in single precision, with fresh weights.

    Raises:
        ValueError: If the router cannot read what the configuration says.
    """
    takes_pixels = "pixel_values" in inspect.signature(model.forward).parameters
    if config.router_input is None:
        config.router_input = "pixels" if takes_pixels and has_fixed_pixels(model) else "embeddings"
    check_router_input(config.router_input)
    if config.router_input == "pixels" and not takes_pixels:
        raise ValueError(
            f"router_input='pixels', but {type(model).__name__} takes no pixel_values: use 'embeddings' for models "
            "without images."
        )
    if config.router_input in _FACTORIES:
        return Router({"all": _FACTORIES[config.router_input](config, model)}, config)
    towers = find_towers(model)
    branches: dict[str, nn.Module] = {}
    for tower, source in choose_router_sources(config.router_input, list(towers)).items():
        if source == "pixels":
            branches[tower] = PixelRouter(
                config.num_experts,
                get_num_channels(towers[tower]),
                config.router_image_size,
                cast(PixelArchitecture, config.router_architecture),
            )
        else:
            branches[tower] = EmbeddingRouter(config.num_experts, get_output_dim(find_input_layer(towers[tower])))
    return Router(branches, config)


class Carrier(torch.autograd.Function):
    """The identity on a tensor whose backward pass hands the routing weights the gradient of their leaf.

    Each reentrant checkpoint runs a backward pass of its own, which would go through the router again. The
    checkpointed blocks therefore see a leaf that collects their gradients. The carried tensor is the input of the
    model, so it is reached last on the way back, when the leaf has collected everything. The leaf is passed inside a
    list: if it were a direct input, autograd would run this function before the gradients of layers outside the
    checkpoints arrive.
    """

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, weights: torch.Tensor, leaf: list[torch.Tensor]) -> torch.Tensor:
        """Return a view of the tensor, any shape, and remember the leaf of the weights `(B, E)`."""
        ctx.leaf = leaf[0]
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        """Return the incoming gradient for the tensor and the gradient of the leaf for the weights."""
        collected, ctx.leaf.grad = ctx.leaf.grad, None
        return gradient, collected, None
