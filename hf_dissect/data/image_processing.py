"""Image processors that prepare smaller pictures than the model's own."""

import functools
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

_SIDES = ("height", "width", "shortest_edge", "longest_edge")


@dataclass(frozen=True)
class SizedProcessing:
    """Preparation of pictures of one size; without arguments, as the image processor does by itself.

    Args:
        keywords: Keywords of the image processor.
        smallest_side: Number of pixels that each side of a decoded picture needs; None for all that there are.
    """

    keywords: dict[str, Any] = field(default_factory=dict)
    smallest_side: int | None = None


def find_processing(processor: Any, size: int | None) -> SizedProcessing:
    """Return the preparation of square pictures of a smaller size, scaled as the processor scales its own.

    Args:
        processor: Image processor.
        size: Side of the prepared pictures in pixels; None for the processor's own.

    Raises:
        ValueError: The processor does not prepare square pictures by resizing and cropping, or only larger ones.
    """
    return SizedProcessing() if size is None else _find_processing(processor, size)


@functools.lru_cache(maxsize=64)
def _find_processing(processor: Any, size: int) -> SizedProcessing:
    name, own = type(processor).__name__, _prepare(processor, {})
    resized = _read_sides(getattr(processor, "size", None))
    if own is None or not resized or not getattr(processor, "do_resize", False):
        raise ValueError(
            f"image_size={size} needs an image processor that resizes pictures to one square size, and {name} does "
            "not; leave image_size (data.image_size in a recipe) out."
        )
    if size > own:
        raise ValueError(f"image_size={size} is above the {own} pixels that {name} prepares; allowed: at most {own}.")
    if size == own:
        return SizedProcessing()
    scaled = {side: max(size, round(pixels * size / own)) for side, pixels in resized.items()}
    keywords: dict[str, Any] = {"size": scaled}
    if getattr(processor, "do_center_crop", False):
        keywords["crop_size"] = {"height": size, "width": size}
    if _prepare(processor, keywords) != size:
        raise ValueError(
            f"image_size={size}: {name} does not prepare pictures of this size with {keywords}; leave image_size "
            "(data.image_size in a recipe) out."
        )
    return SizedProcessing(keywords, max(scaled.values()))


def _read_sides(size: Any) -> dict[str, int]:
    given = dict(size) if size else {}
    return {side: given[side] for side in _SIDES if given.get(side)}


def _prepare(processor: Any, keywords: dict[str, Any]) -> int | None:
    """Return the side of the squares that a processor makes of elongated pictures; None if it makes no squares."""
    pictures = [Image.new("RGB", shape) for shape in ((90, 60), (60, 90))]
    try:
        pixels = processor(images=pictures, return_tensors="pt", **keywords).get("pixel_values")
    except ValueError:  # pictures of different sizes make no batch
        return None
    return None if pixels is None or pixels.ndim != 4 or pixels.shape[2] != pixels.shape[3] else pixels.shape[3]
