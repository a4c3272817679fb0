"""Check that two models read the same pixels of a picture, so that one batch can serve both."""

from typing import Any

import torch
from PIL import Image


def check_same_pictures(where: str, theirs: Any, ours: Any, noun: str) -> None:
    """Check that two image processors make the same pixels.

    Args:
        where: Setting that names the other model, and its value, for the error.
        theirs: Image processor of the other model.
        ours: Image processor of the model that trains.
        noun: Word for the other model.

    Raises:
        ValueError: The pixels differ in shape or value.
    """
    pictures = [Image.radial_gradient("L").convert("RGB").resize(size) for size in ((83, 61), (50, 120))]
    made = [dict(processor(images=pictures, return_tensors="pt")) for processor in (theirs, ours)]
    same = made[0].keys() == made[1].keys() and all(
        made[0][name].shape == made[1][name].shape
        and torch.allclose(made[0][name].float(), made[1][name].float(), atol=1e-3)
        for name in made[0]
    )
    if not same:
        shapes = [tuple(part["pixel_values"].shape[1:]) for part in made]
        found = "differs" if shapes[0] == shapes[1] else f"makes {shapes[0]} of a picture, not {shapes[1]}"
        raise ValueError(
            f"{where}: its image processor {found}, so one batch cannot serve both; take {noun} of the same image "
            f"size and normalisation, or load the model with the image processor of {noun.replace('a ', 'the ', 1)}."
        )
