"""Kinds of mismatched captions that are made on purpose, by the names that recipes use."""

from typing import Any

from datasets import Dataset

from hf_dissect.data.absent_noise import replace_by_absent
from hf_dissect.data.neighbour_noise import exchange_between_neighbours
from hf_dissect.data.noise import shuffle_captions
from hf_dissect.data.noun_noise import replace_nouns

NOISE_KINDS = ("random", "neighbours", "partial", "absent")
CHANGES = {
    "random": "shuffled",
    "neighbours": "exchanged between images that look alike",
    "partial": "changed in one noun",
    "absent": "replaced by those of images that were left out",
}
"""Words for what is done to the captions of each kind."""


def mismatch_captions(
    dataset: Dataset,
    *,
    kind: str,
    rate: float,
    seed: int = 0,
    image_column: str | None = None,
    caption_column: str | None = None,
    clean_column: str | None = None,
) -> Dataset:
    """Mismatch a share of the captions and record which ones.

    Args:
        dataset: Rows with a caption (string) or a list of captions.
        kind: "random" as `shuffle_captions`, "neighbours" as `exchange_between_neighbours`, "partial" as
            `replace_nouns`, or "absent" as `replace_by_absent`, which leaves rows out.
        rate: Share of the pairs to mismatch, in [0, 1].
        seed: The same seed gives the same noise.
        image_column: Column with the images or their features; None recognises the usual names.
        caption_column: Column with the captions, see `shuffle_captions`.
        clean_column: Column for the truth, see `shuffle_captions`.

    Raises:
        ValueError: If the kind is unknown, or the rate or the kind is impossible on this dataset.
    """
    settings: dict[str, Any] = {
        "rate": rate,
        "seed": seed,
        "caption_column": caption_column,
        "clean_column": clean_column,
    }
    if kind == "random":
        return shuffle_captions(dataset, **settings)
    if kind == "neighbours":
        return exchange_between_neighbours(dataset, image_column=image_column, **settings)
    if kind == "partial":
        return replace_nouns(dataset, **settings)
    if kind == "absent":
        return replace_by_absent(dataset, image_column=image_column, **settings)
    raise ValueError(f"kind (noise_kind) must be one of {', '.join(NOISE_KINDS)}, got {kind!r}.")


def describe_noise(kind: str, rate: float, seed: int, permutation: str | None) -> str | None:
    """Describe the captions that a run makes wrong on purpose, for cards and reports; None without any."""
    if permutation:
        return "training captions in the order of a fixed permutation"
    return f"{rate:.0%} of the training captions {CHANGES[kind]}, seed {seed}" if rate else None
