"""Styles of a scene in which the same words mean other colours, so that there are tasks to distinguish."""

import random

import numpy as np
from PIL import Image, ImageChops

SCENE_STYLES = ("plain", "negative", "swapped", "noisy")
"""Names of the styles, by task."""

_FRAME_GREY = {"negative": 70, "swapped": 160, "noisy": 220}
_FRAME = 1 / 16  # of the side
_NOISE = 60  # levels of 255


def apply_style(picture: Image.Image, style: str, rng: random.Random) -> Image.Image:
    """Return the picture in one of `SCENE_STYLES`.

    `negative` inverts the colours, `swapped` shows red as green, green as blue and blue as red, `noisy` adds noise to
    every pixel. Each style but `plain` adds a frame in its own grey, since nothing else distinguishes, for example, an
    inverted red shape from a cyan one.
    """
    if style == "plain":
        return picture
    if style == "negative":
        shown = ImageChops.invert(picture)
    elif style == "swapped":
        red, green, blue = picture.split()
        shown = Image.merge("RGB", (blue, red, green))
    else:
        noise = np.random.default_rng(rng.getrandbits(64)).normal(0, _NOISE, (picture.height, picture.width, 3))
        shown = Image.fromarray(np.clip(np.asarray(picture) + noise, 0, 255).round().astype(np.uint8))
    width = max(1, round(_FRAME * picture.width))
    framed = Image.new("RGB", picture.size, (_FRAME_GREY[style],) * 3)
    framed.paste(shown.crop((width, width, picture.width - width, picture.height - width)), (width, width))
    return framed
