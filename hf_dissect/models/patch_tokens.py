"""Patch tokens of a ViT tower: dropped in training or scoring, and with positions that fit smaller pictures."""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from hf_dissect.models.families import TOWERS, bare_model, is_frozen_tower, list_networks

_PREFIX_TOKENS: dict[str, Callable[[Any], int]] = {
    "altclip_vision_model": lambda config: 1,
    "chinese_clip_vision_model": lambda config: 1,
    "clip_vision_model": lambda config: 1,
    "deit": lambda config: 2,
    "dinov2": lambda config: 1,
    "dinov2_with_registers": lambda config: 1 + config.num_register_tokens,
    "metaclip_2_vision_model": lambda config: 1,
    "siglip_vision_model": lambda config: 0,
    "vit": lambda config: 1,
}
"""Number of tokens before those of the patches, by the type of the tower; other towers have no such tokens."""
_REASONS = {
    "siglip2_vision_model": "its pictures have any aspect ratio, and a mask tells their patches from padding; the "
    "SigLIP 2 checkpoints of a fixed size, such as google/siglip2-base-patch16-224, are of the type siglip",
    "timm_wrapper": "timm keeps its tokens to itself; take the same network from transformers, such as a ViT",
    "precomputed_features": "it reads stored features and no pictures",
}
# Plastic number: its multiples spread points evenly over a square, whatever their number (the R2 sequence).
_SPREAD = 0.7548776662466927, 0.5698402909980532


class PatchGrid(NamedTuple):
    """Facts about the pictures of a tower.

    Attributes:
        side: Height and width of its pictures in pixels.
        patch: Height and width of a patch in pixels.
        prefix: Number of tokens before those of the patches.
    """

    side: tuple[int, int]
    patch: tuple[int, int]
    prefix: int

    @property
    def num_patches(self) -> int:
        """Number of patches of a picture of the tower's own size."""
        return (self.side[0] // self.patch[0]) * (self.side[1] // self.patch[1])


def read_patch_grid(model: nn.Module, setting: str) -> PatchGrid:
    """Return the facts about the pictures that a dual encoder with a ViT tower reads.

    Args:
        model: Dual encoder, wrapped or not.
        setting: Setting that needs them, with its value, for errors.

    Raises:
        ValueError: The images go through something other than a plain ViT.
    """
    tower = _find_tower(model, setting)
    config: Any = tower.config
    sizes = (config.image_size, config.patch_size)
    side, patch = ((size, size) if isinstance(size, int) else tuple(size) for size in sizes)
    return PatchGrid(side, patch, _PREFIX_TOKENS[config.model_type](config))


def _find_tower(model: nn.Module, setting: str) -> Any:
    if len(list_networks(model)) > 1:
        raise ValueError(
            f"{setting} is not for two networks that train together (objective.gsc.dual); leave one of the two out."
        )
    bare = bare_model(model)
    tower = next((part for name in TOWERS["vision"] if (part := getattr(bare, name, None)) is not None), None)
    kind = getattr(getattr(tower, "config", None), "model_type", None)
    if tower is None or kind not in _PREFIX_TOKENS or not isinstance(getattr(tower, "embeddings", None), nn.Module):
        name = type(bare if tower is None else tower).__name__
        reason = _REASONS.get(str(kind), "it has no sequence of patch tokens of which each has its position")
        raise ValueError(
            f"{setting} needs a plain ViT as the vision tower, and this one is a {name}: {reason}. Leave the setting "
            "out, or take a model with the vision tower of CLIP, SigLIP, Chinese-CLIP, ViT, DeiT or DINOv2."
        )
    return tower


def check_patch_dropout(model: nn.Module, dropout: float, setting: str, training: bool = True) -> None:
    """Check that a share of the patches of a model can be dropped.

    Args:
        model: Dual encoder, wrapped or not.
        dropout: Share of the patches.
        setting: Name of the setting, for errors.
        training: True if they are dropped in training.

    Raises:
        ValueError: It has no patch tokens, so few that none would be dropped, or a frozen tower.
    """
    grid = read_patch_grid(model, f"{setting}={dropout}")
    kept = count_kept(grid.num_patches, dropout)
    if kept == grid.num_patches:
        raise ValueError(
            f"{setting}={dropout} drops none of the {grid.num_patches} patches of a picture; set it to at least "
            f"{math.ceil(1000 * 0.5 / grid.num_patches + 1e-9) / 1000:g}, or to 0."
        )
    if training and is_frozen_tower(_find_tower(model, setting)):
        raise ValueError(
            f"{setting}={dropout} drops nothing in a frozen vision tower, which runs as in evaluation; set it to 0, "
            "or model.freeze to null."
        )


def count_kept(num_patches: int, dropout: float) -> int:
    """Return the number of patches that stay, at least 1."""
    return max(1, round((1 - dropout) * num_patches))


class PatchTokens:
    """Hooks at the patch embeddings of a ViT tower, which leave its weights and its configuration as they are.

    A picture of another size than the tower's own gets positions that are interpolated between those of the tower. In
    training, a share of the patches is dropped (FLIP, arXiv 2212.00794, section 3), drawn for each picture from
    torch's generator, so that a saved random state gives the same patches again. In evaluation, nothing is dropped
    except within `scoring`. Class tokens stay, and each patch that stays has its own position.

    Args:
        dropout: Share of the patches that is dropped in training.
        scoring_dropout: Share that is dropped within `scoring`: the same patches of each picture, spread evenly.
    """

    def __init__(self, dropout: float = 0.0, scoring_dropout: float = 0.0) -> None:
        self.dropout = dropout
        self.scoring_dropout = scoring_dropout
        self._is_scoring = False
        self._prefix = 0
        self._side: tuple[int, int] = (0, 0)
        self._takes_size = True
        self._module: nn.Module | None = None
        self._handles: list[Any] = []

    def attach(self, model: nn.Module, setting: str = "patch_dropout") -> None:
        """Act on a model from now on; without effect on one that it acts on already.

        Args:
            model: Dual encoder, wrapped or not.
            setting: Setting that needs it, for errors.

        Raises:
            ValueError: The model has no patch tokens.
        """
        module = _find_tower(model, setting).embeddings
        if module is self._module:
            return
        self.detach()
        grid = read_patch_grid(model, setting)
        self._prefix, self._side, self._module = grid.prefix, grid.side, module
        # DINOv2 interpolates without being asked.
        self._takes_size = "interpolate_pos_encoding" in inspect.signature(module.forward).parameters
        self._handles = [
            module.register_forward_pre_hook(self._fit_positions, with_kwargs=True),
            module.register_forward_hook(self._drop),
        ]

    def detach(self) -> None:
        """Leave the model as it was before."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._module = [], None

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """Drop `scoring_dropout` in evaluation."""
        self._is_scoring = True
        try:
            yield
        finally:
            self._is_scoring = False

    def choose(self, num_pictures: int, num_patches: int, device: torch.device) -> torch.Tensor:
        """Draw the patches that stay in training, int64 `(num_pictures, k)` in ascending order."""
        kept = count_kept(num_patches, self.dropout)
        return torch.rand(num_pictures, num_patches, device=device).topk(kept, dim=1).indices.sort(dim=1).values

    def _fit_positions(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        pixels = args[0] if args else kwargs["pixel_values"]
        if self._takes_size and tuple(pixels.shape[-2:]) != self._side:
            kwargs = {**kwargs, "interpolate_pos_encoding": True}
        return args, kwargs

    def _drop(self, module: nn.Module, args: tuple[Any, ...], tokens: torch.Tensor) -> torch.Tensor:
        prefix, count = self._prefix, tokens.shape[1] - self._prefix
        if module.training and self.dropout:
            kept = self.choose(len(tokens), count, tokens.device)
            patches = tokens[:, prefix:].gather(1, kept[..., None].expand(-1, -1, tokens.shape[2]))
        elif self._is_scoring and not module.training and self.scoring_dropout:
            patches = tokens[:, prefix:][:, choose_spread(count, self.scoring_dropout).to(tokens.device)]
        else:
            return tokens
        return torch.cat([tokens[:, :prefix], patches], dim=1) if prefix else patches


def choose_spread(num_patches: int, dropout: float) -> torch.Tensor:
    """Choose the patches that stay when the same ones stay in each picture, spread evenly over it.

    Args:
        num_patches: Number of patches of a picture.
        dropout: Share that is dropped.

    Returns:
        Their numbers, int64 `(k,)` in ascending order.
    """
    number, width = torch.arange(num_patches), max(1, math.isqrt(num_patches))
    phase = ((number // width) * _SPREAD[0] + (number % width) * _SPREAD[1]) % 1
    return phase.argsort(stable=True)[: count_kept(num_patches, dropout)].sort().values


def shrink_pictures(inputs: Mapping[str, Any], size: int | None) -> dict[str, Any]:
    """Return inputs of a model whose pictures have a side of at most `size` pixels.

    Args:
        inputs: Inputs by name, with `pixel_values` `(B, C, S, S)` if there are pictures.
        size: Side in pixels; None to change nothing.
    """
    pixels = inputs.get("pixel_values")
    if size is None or pixels is None or pixels.dim() != 4 or pixels.shape[-1] <= size:
        return dict(inputs)
    with torch.no_grad(), torch.autocast(pixels.device.type, enabled=False):
        smaller = nn.functional.interpolate(pixels.float(), size=(size, size), mode="bilinear", antialias=True)
    return {**inputs, "pixel_values": smaller.to(pixels.dtype)}
