"""Scoring of candidates by smaller pictures or by a part of their patches."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from hf_dissect.models.patch_tokens import PatchTokens, shrink_pictures


class CheapScoring:
    """Forward passes that score on smaller pictures, fewer patches, or both; without arguments, on whole pictures.

    A model that never trained on such pictures ranks them otherwise, so some steps of the training use them, too.

    Args:
        image_size: Side of the pictures in pixels; larger ones are scaled down on the device of the model, and the
            positions of the patches interpolated. None for all pixels.
        patch_dropout: Share of the patches that is dropped, the same ones of each picture.
        exposure: Share of the optimiser steps, evenly spaced, that train on pictures of `image_size`.
    """

    def __init__(self, image_size: int | None = None, patch_dropout: float = 0.0, exposure: float = 0.0) -> None:
        self.image_size = image_size
        self.exposure = exposure
        self.tokens = PatchTokens(scoring_dropout=patch_dropout)
        self._is_used = image_size is not None or patch_dropout > 0

    def check(self, is_planned: bool, has_reference: bool) -> None:
        """Check that the scores are compared with none of whole pictures.

        Args:
            is_planned: True if a plan compares them with those of the training step.
            has_reference: True if a strategy compares them with those of a reference model.

        Raises:
            ValueError: They are.
        """
        if self._is_used and (is_planned or has_reference):
            other = "rescore_every > 1" if is_planned else "a reference model"
            raise ValueError(
                f"cheap_scoring does not go with {other}, whose scores are those of whole pictures; leave one out."
            )

    @contextmanager
    def prepare(self, model: nn.Module, inputs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Score within this context, on the inputs that it gives.

        Args:
            model: Dual encoder, wrapped or not.
            inputs: Inputs of the model on its device, with `pixel_values` `(B, C, S, S)`.
        """
        if not self._is_used:
            yield dict(inputs)
            return
        self.tokens.attach(model, "scoring_image_size or scoring_patch_dropout")
        with self.tokens.scoring():
            yield shrink_pictures(inputs, self.image_size)

    def expose(self, batch: dict[str, Any], step: int) -> dict[str, Any]:
        """Return a batch to train on, with smaller pictures if this is the turn of its step.

        Args:
            batch: Batch of pairs.
            step: Number of the optimiser step, from 0.
        """
        is_turn = int((step + 1) * self.exposure + 1e-9) > int(step * self.exposure + 1e-9)
        return shrink_pictures(batch, self.image_size) if is_turn and self._is_used else batch
