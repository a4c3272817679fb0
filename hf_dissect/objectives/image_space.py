"""Spaces in which images are compared, to find those that may fit a caption whose own image does not."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hf_dissect.data.model_inputs import forward_inputs
from hf_dissect.losses.logit_rows import promote_to_float32
from hf_dissect.models.families import bare_model
from hf_dissect.models.feature_encoder import find_feature_size
from hf_dissect.models.picture_check import check_same_pictures
from hf_dissect.models.towers import pool_images
from hf_dissect.models.vision_towers import Tower, load_vision_model
from hf_dissect.selection.past_model import PastModel
from hf_dissect.selection.scoring import evaluation_mode

SETTING = "repair.space (objective.repair.space in a recipe)"
ENCODER = "repair.encoder (objective.repair.encoder in a recipe)"
MOMENTUM = 0.99


class ImageSpace:
    """The embeddings of the model that trains, which cost nothing; base class of the other spaces."""

    def embed(
        self, model: nn.Module, batch: Mapping[str, Any], outputs: Mapping[str, torch.Tensor], begins_step: bool
    ) -> torch.Tensor:
        """Return a vector for the image of each pair of a training step.

        Args:
            model: Model that trains, wrapped or not.
            batch: Batch of `b` pairs on its device.
            outputs: Outputs of the model, with `image_embeds` `(b, D)`.
            begins_step: True for the first micro-batch of an optimiser step.

        Returns:
            Vectors `(b, F)` without gradient, in at least single precision.
        """
        return promote_to_float32(outputs["image_embeds"].detach())

    def state_dict(self) -> dict[str, Any]:
        """Return what the space learns."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""


class StoredSpace(ImageSpace):
    """The stored features that the model reads in place of images."""

    def embed(
        self, model: nn.Module, batch: Mapping[str, Any], outputs: Mapping[str, torch.Tensor], begins_step: bool
    ) -> torch.Tensor:
        """Return the stored features; see `ImageSpace.embed`."""
        return promote_to_float32(batch["pixel_values"].detach())


class AverageSpace(ImageSpace):
    """The embeddings by a moving average of the weights, which move less; they cost a forward pass of the images."""

    def __init__(self) -> None:
        self._past = PastModel("average", MOMENTUM, 1, setting=(SETTING, "learnt"))

    def embed(
        self, model: nn.Module, batch: Mapping[str, Any], outputs: Mapping[str, torch.Tensor], begins_step: bool
    ) -> torch.Tensor:
        """Return the embeddings by the averaged weights; see `ImageSpace.embed`."""
        if begins_step:
            self._past.update(model)
        if not self._past.is_ready:
            return super().embed(model, batch, outputs, begins_step)
        network: Any = bare_model(model)
        inputs = forward_inputs(model, batch)
        names = inputs.keys() & inspect.signature(network.get_image_features).parameters
        with torch.no_grad(), evaluation_mode(model), self._past.in_place_of(model):
            features = network.get_image_features(**{name: inputs[name] for name in names})
        return promote_to_float32(features if torch.is_tensor(features) else features.pooler_output)

    def state_dict(self) -> dict[str, Any]:
        """Return the average."""
        return self._past.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with a saved average."""
        self._past.load_state_dict(state)


class EncoderSpace(ImageSpace):
    """The output of a frozen image encoder, of which neither model nor optimiser nor checkpoints know.

    Args:
        tower: Encoder and its pooling.
    """

    def __init__(self, tower: Tower) -> None:
        self._tower = tower
        tower.model.requires_grad_(False)

    def embed(
        self, model: nn.Module, batch: Mapping[str, Any], outputs: Mapping[str, torch.Tensor], begins_step: bool
    ) -> torch.Tensor:
        """Return the pooled output of the encoder; see `ImageSpace.embed`."""
        encoder = self._tower.model.to(batch["pixel_values"].device)
        names = batch.keys() & inspect.signature(encoder.forward).parameters
        with torch.no_grad():
            output = encoder(**{name: batch[name] for name in names}, return_dict=True)
            return promote_to_float32(pool_images(output, self._tower.pooling))


def make_image_space(space: str, encoder: str | None, model: nn.Module | None, collator: Any) -> ImageSpace:
    """Make the space that the settings of `objective.repair` ask for.

    Args:
        space: "auto", "learnt", "average", "stored" or "encoder".
        encoder: Hub id or folder of a frozen image encoder.
        model: Model that trains; None to check nothing.
        collator: Collator of the run.

    Raises:
        ValueError: The space does not fit the model; the message names the setting.
        OSError: The encoder cannot be read or downloaded.
    """
    size = None if model is None else find_feature_size(model, "vision")
    if encoder is not None:
        if size is not None:
            raise ValueError(
                f"{ENCODER} is {encoder!r}, and the model reads stored features of the images; leave it out, they "
                "are the space."
            )
        tower = load_vision_model(encoder, ENCODER)
        ours = getattr(collator, "image_processor", None)
        if ours is not None:
            check_same_pictures(f"{ENCODER} {encoder!r}", tower.processor, ours, "an encoder")
        return EncoderSpace(tower)
    if space == "stored" and model is not None and size is None:
        raise ValueError(
            f"{SETTING} is 'stored', and the model reads images; set data.image_features, or the space to learnt."
        )
    if space == "stored" or space == "auto" and size is not None:
        return StoredSpace()
    return AverageSpace() if space == "average" else ImageSpace()
