"""Vision towers of SigLIP in timm: open_clip's configuration has their names, and not their sizes."""

from typing import NamedTuple


class SiglipTower(NamedTuple):
    """Sizes of a vision tower: `heads` and `activation` cannot be read off its weights."""

    width: int
    layers: int
    heads: int
    mlp_width: int
    patch_size: int
    image_size: int
    activation: str


# Some names of timm stand for the exact GELU, others for its approximation by tanh, with which SigLIP was trained.
_EXACT, _TANH = "gelu", "gelu_pytorch_tanh"
_BASE, _LARGE, _SO400M, _GIANT = (768, 12, 12, 3072), (1024, 24, 16, 4096), (1152, 27, 16, 4304), (1536, 40, 16, 6144)
SIGLIP_TOWERS: dict[str, SiglipTower] = {
    f"vit_{size}_patch{patch}_siglip_{image}": SiglipTower(*sizes, patch, image, activation)
    for size, sizes, patch, image, activation in [
        ("base", _BASE, 32, 256, _TANH),
        *(("base", _BASE, 16, image, _EXACT) for image in (224, 256, 384, 512)),
        *(("large", _LARGE, 16, image, _EXACT) for image in (256, 384)),
        ("large", _LARGE, 16, 512, _TANH),
        *(("so400m", _SO400M, 14, image, _EXACT) for image in (224, 378, 384)),
        *(("so400m", _SO400M, 16, image, _TANH) for image in (256, 384, 512)),
        *(("giantopt", _GIANT, 16, image, _TANH) for image in (256, 384)),
    ]
}
"""Towers by their names in timm."""
