"""Scale pixels of any depth to 8 bits by the range that their format documents, and make pictures of arrays."""

from typing import Any

import numpy as np
import torch
from PIL import Image

from hf_dissect.data.encoded_pictures import as_numpy

_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
_CHANNELS = (1, 3, 4)


class UnusableImage(ValueError):
    """Error for an image that is missing or cannot be decoded, so that its row is skipped and counted.

    Args:
        problem: Cause, without the path.
        path: Path or key of the image; None for one without.
    """

    def __init__(self, problem: str, path: str | None = None) -> None:
        super().__init__(problem if path is None else f"{problem}: {path}")
        self.problem = problem
        self.path = path


def scale_to_8_bits(image: Image.Image) -> Image.Image:
    """Scale a picture of 16-bit or 32-bit pixels to 8 bits.

    16 bits are scaled by the range of the file: 0 to 65,535, or that of the bits that a TIFF names. 32-bit numbers
    have no such range: integers up to 255 are taken for 8 bits and those up to 65,535 for 16; floats from 0 to 1, or
    else from 0 to 255, are taken for that range; any others are stretched from the darkest to the lightest.

    Args:
        image: Picture of a mode "I;16...", "I" or "F".

    Raises:
        UnusableImage: Pixels are not finite.
    """
    pixels = np.asarray(image, dtype=np.float64)
    low, high = _find_range(image, pixels)
    scaled = np.clip((pixels - low) / max(high - low, 1e-12), 0, 1)
    if image.mode.startswith("I;16"):
        if image.format == "TIFF" and getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0:
            scaled = 1 - scaled
        if isinstance(clear := image.info.get("transparency"), int):
            scaled[pixels == clear] = 1
    return Image.fromarray((scaled * 255).round().astype(np.uint8))


def _find_range(image: Image.Image, pixels: np.ndarray) -> tuple[float, float]:
    tags = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    bits = (tags.get(_BITS_PER_SAMPLE) or (0,))[0]
    if image.mode.startswith("I;16"):
        return 0, 2**bits - 1 if 8 < bits < 16 else 65535
    if image.mode == "I" and bits == 16:
        return (-32768, 32767) if (tags.get(_SAMPLE_FORMAT) or (1,))[0] == 2 else (0, 65535)
    if image.mode == "I" and image.format in ("PPM", "PNG"):
        return 0, 65535
    if not np.isfinite(pixels).all():
        raise UnusableImage("pixels that are not finite")
    low, high = float(pixels.min()), float(pixels.max())
    for top in (1, 255) if image.mode == "F" else (255, 65535):
        if low >= 0 and high <= top:
            return 0, top
    return low, high


def make_picture(value: Any) -> Image.Image:
    """Make a picture of an array of pixels.

    Args:
        value: Array, tensor or nested lists `(height, width)`, `(height, width, channels)` or `(channels, height,
            width)` with 1, 3 or 4 channels (the fourth is alpha): integers from 0 to 255, uint16 up to 65,535, floats
            from 0 to 1, or booleans. Where both orders fit, a tensor has its channels first, an array last.

    Raises:
        UnusableImage: The values are not such an array; a side of one pixel means a vector and not a picture.
    """
    channels_first = isinstance(value, torch.Tensor)
    pixels = _as_dense(as_numpy(value))
    shape = f"an array of {pixels.dtype} of shape {pixels.shape}"
    if pixels.dtype.kind not in "iufb" or pixels.size == 0:
        raise UnusableImage(f"{shape} is not a picture")
    if pixels.ndim == 3 and not (
        pixels.shape[2] in _CHANNELS and not (channels_first and pixels.shape[0] in _CHANNELS)
    ):
        pixels = np.moveaxis(pixels, 0, -1)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    is_picture = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in _CHANNELS)
    if not is_picture or min(pixels.shape[:2]) == 1:
        raise UnusableImage(f"{shape} is not a picture, which has (height, width[, channels]) of more than one pixel")
    return Image.fromarray(np.ascontiguousarray(_scale_array(pixels)))


def _as_dense(value: Any) -> np.ndarray:
    """Return one array of nested lists or of an array of arrays, which Arrow makes of lists of any length."""
    try:
        dense = np.asarray(value)
        if dense.dtype == object and dense.ndim and dense.size:
            dense = np.stack([_as_dense(part) for part in dense])
    except ValueError as error:
        raise UnusableImage("lists of unequal lengths are not a picture") from error
    return dense


def _scale_array(pixels: np.ndarray) -> np.ndarray:
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype == bool:
        return pixels.astype(np.uint8) * 255
    if pixels.dtype == np.uint16:
        return (pixels / 257).round().astype(np.uint8)
    low, high, dtype = pixels.min(), pixels.max(), pixels.dtype
    if pixels.dtype.kind == "f":
        if not (low >= 0 and high <= 1):  # also for NaN
            raise UnusableImage(
                f"array of {dtype} from {low:.4g} to {high:.4g}: floats are pixels from 0 to 1, not normalised"
            )
        return (pixels.astype(np.float64) * 255).round().astype(np.uint8)
    if low < 0 or high > 255:
        raise UnusableImage(
            f"array of {dtype} from {low} to {high}: pixels are integers from 0 to 255, or uint16 for 16 bits"
        )
    return pixels.astype(np.uint8)
