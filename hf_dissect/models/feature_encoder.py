"""A tower that passes stored features on, so that only the rest of the model trains."""

import math
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from hf_dissect.models.families import bare_model


class PrecomputedFeaturesConfig(PreTrainedConfig):
    """Configuration of a `PrecomputedFeaturesModel`.

    Args:
        hidden_size: Dimension D of a stored feature vector.
        dropout: Share of the feature coordinates set to zero in training, in [0, 1).
        normalize: True to scale every vector to length `sqrt(D)`, which gives its coordinates about unit size. The
            initialisation of the projection behind it expects that, whatever the scale of the stored features.

    Raises:
        ValueError: If `hidden_size` is below 1 or `dropout` outside [0, 1).
    """

    model_type = "precomputed_features"

    hidden_size: int = 512
    dropout: float | int = 0.0
    normalize: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        if self.hidden_size < 1:
            raise ValueError(
                f"hidden_size must be the dimension of the stored features, at least 1, got {self.hidden_size}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")
        super().__post_init__(**kwargs)


class PrecomputedFeaturesModel(PreTrainedModel):
    """A tower without parameters, which returns stored features of images, or of captions in a `DualEncoder`.

    As `vision_model` of a `VisionTextDualEncoderModel`, it makes locked-image tuning ("LiT", arXiv 2111.07991) cost no
    image encoder: only the projection behind it and the text tower train.

    Args:
        config: Configuration of the tower.
    """

    config: PrecomputedFeaturesConfig
    config_class = PrecomputedFeaturesConfig
    base_model_prefix = "precomputed_features"
    main_input_name = "pixel_values"
    input_modalities = ("image",)  # type: ignore[assignment]  # a tuple in every model of transformers
    # Without attention, any implementation that the text tower requests is fine.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: PrecomputedFeaturesConfig) -> None:
        super().__init__(config)
        self.dropout = nn.Dropout(config.dropout)
        self.post_init()

    def forward(
        self, pixel_values: torch.Tensor, return_dict: bool | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling | tuple[torch.Tensor, torch.Tensor]:
        """Return the features in the form of a vision tower's output.

        Args:
            pixel_values: Stored features `(B, hidden_size)` of any floating type, under the name that vision towers
                use.
            return_dict: False to return the tuple `(last_hidden_state, pooler_output)`.
            **kwargs: Arguments of other towers (`output_attentions`, ...), which have no effect here.

        Returns:
            `pooler_output` `(B, hidden_size)` and `last_hidden_state` `(B, 1, hidden_size)`, the same numbers.

        Raises:
            ValueError: If `pixel_values` is not of the shape `(B, hidden_size)`.
        """
        size = self.config.hidden_size
        if pixel_values.ndim != 2 or pixel_values.shape[1] != size:
            raise ValueError(
                f"pixel_values must be stored features of shape (B, {size}), got {tuple(pixel_values.shape)}; "
                "set vision_config.hidden_size to the dimension of the stored features"
            )
        features = pixel_values
        if self.config.normalize:
            features = nn.functional.normalize(features, dim=-1) * math.sqrt(size)
        features = self.dropout(features)
        sequence = features.unsqueeze(1)
        if return_dict is False:
            return sequence, features
        return BaseModelOutputWithPooling(last_hidden_state=sequence, pooler_output=features)


def find_feature_size(model_or_config: Any, tower: str) -> int | None:
    """Return the dimension of the stored features that a tower reads; None for a tower that encodes its input itself.

    Args:
        model_or_config: Dual encoder, wrapped or not, or its configuration; None for a model that is not made yet.
        tower: `"vision"` or `"text"`.
    """
    config = model_or_config
    if isinstance(model_or_config, nn.Module):
        config = getattr(bare_model(model_or_config), "config", None)
    part: Any = getattr(config, f"{tower}_config", None)
    # By the name of the type, because a module that is reloaded has another class.
    is_stored = getattr(part, "model_type", None) == PrecomputedFeaturesConfig.model_type
    return part.hidden_size if is_stored else None


# `exist_ok`, because a module may be imported twice (a reloading notebook, a spawned worker's second path).
AutoConfig.register(PrecomputedFeaturesConfig.model_type, PrecomputedFeaturesConfig, exist_ok=True)
AutoModel.register(PrecomputedFeaturesConfig, PrecomputedFeaturesModel, exist_ok=True)
