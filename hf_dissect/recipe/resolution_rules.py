"""Checks of sizes of pictures and dropped patches against the settings they must agree with."""

from collections.abc import Iterator, Mapping
from typing import Any

from hf_dissect.settings import show

Settings = Mapping[str, Any]
UNSCORED = ("none", "random")


def find_resolution_faults(settings: Settings) -> Iterator[tuple[str, str, str]]:
    """Yield each fault: the setting to blame, one that it must agree with ("" for none), and what is wrong.

    Args:
        settings: Values of `image_size`, `patch_dropout`, `scoring_image_size`, `scoring_patch_dropout`,
            `scoring_exposure`, `rescore_every`, `reference` and `encoder` (that of a repair).
    """
    size = settings["image_size"]
    if size is not None:
        from hf_dissect.data.image_sizes import find_size_fault  # imports torch: only for a recipe that is really read

        if (problem := find_size_fault(size)) is not None:
            yield "image_size", "", problem
    if settings["scoring_exposure"] and settings["scoring_image_size"] is None:
        yield (
            "scoring_exposure",
            "scoring_image_size",
            f"{settings['scoring_exposure']} has no size to train on: scoring_image_size is null; set that, or this "
            "to null",
        )
    for name in ("image_size", "scoring_image_size", "scoring_patch_dropout"):
        value = settings[name]
        if not value:
            continue
        if settings["rescore_every"] > 1 and name != "image_size":
            yield (
                name,
                "rescore_every",
                f"{show(value)} does not go with rescore_every {settings['rescore_every']}, which compares scores "
                "with those of the training step on whole pictures; set rescore_every to 1, or leave this out",
            )
        if settings["reference"] is not None:
            yield (
                name,
                "reference",
                f"{show(value)} does not go with reference {show(settings['reference'])}, whose scores are those of "
                "whole pictures; leave one of the two out",
            )
    trains_on = {"image_size": size, "scoring_image_size": settings["scoring_exposure"] != 0}
    smaller = next((name for name, trains in trains_on.items() if trains and settings[name]), None)
    if smaller is not None and settings["encoder"] is not None:
        yield (
            smaller,
            "encoder",
            f"{show(settings[smaller])} does not go with encoder {show(settings['encoder'])} of the repair, which "
            "reads pictures of one size; leave one of the two out",
        )
