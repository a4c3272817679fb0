"""Two dual encoders that train side by side and act as one, by the mean of their similarities."""

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForZeroShotImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.clip.modeling_clip import CLIPOutput

from hf_dissect.models.families import check_dual_encoder, find_loss_kind, logit_scale_and_bias


class TwinDualEncoderConfig(PreTrainedConfig):
    """Configuration of a `TwinDualEncoder`.

    Args:
        first_config: Configuration of the first network, or the content of its `config.json`.
        second_config: Configuration of the second network, or the content of its `config.json`.

    Raises:
        ValueError: If a configuration is missing or of an unknown type.
    """

    model_type = "twin_dual_encoder"
    sub_configs = {"first_config": AutoConfig, "second_config": AutoConfig}

    first_config: PreTrainedConfig | dict[str, Any] | None = None
    second_config: PreTrainedConfig | dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name in self.sub_configs:
            config = getattr(self, name)
            if config is None:
                raise ValueError(f"{name} is missing; give the configuration of a dual encoder, with its model_type")
            if isinstance(config, dict):
                setattr(self, name, AutoConfig.for_model(**config))
        super().__post_init__(**kwargs)

    @property
    def vision_config(self) -> PreTrainedConfig:
        """Vision configuration of the first network; both read the same images."""
        return cast(PreTrainedConfig, self.first_config).vision_config

    @property
    def text_config(self) -> PreTrainedConfig:
        """Text configuration of the first network; both read the same tokens."""
        return cast(PreTrainedConfig, self.first_config).text_config


class TwinDualEncoder(PreTrainedModel):
    """Two dual encoders in the form of one, for co-teaching methods such as GSC+.

    An embedding is the concatenation of the two networks' embeddings, each of unit length and divided by sqrt(2). It
    has unit length, too, and the cosine of two embeddings is the mean of the two networks' cosines. `first` and
    `second` are complete models, which can be saved and used alone.

    Args:
        config: Configurations of the two networks.
    """

    config: TwinDualEncoderConfig
    config_class = TwinDualEncoderConfig
    base_model_prefix = "twin"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")  # type: ignore[assignment]  # a tuple in every model of transformers
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: TwinDualEncoderConfig) -> None:
        super().__init__(config)
        self.first = AutoModel.from_config(config.first_config)
        self.second = AutoModel.from_config(config.second_config)
        self.post_init()

    @classmethod
    def of(cls, first: PreTrainedModel, second: PreTrainedModel) -> "TwinDualEncoder":
        """Join two models without a copy.

        Args:
            first: First network.
            second: Second network.

        Raises:
            ValueError: If one is not a dual encoder or trains with the sigmoid loss, if they do not read the same
                images and tokens, or if their embeddings differ in size.
        """
        for network in (first, second):
            check_dual_encoder(network)
            if find_loss_kind(network) != "softmax":
                raise ValueError(
                    f"{type(network).__name__} trains with the sigmoid loss, but twins need the softmax loss; choose "
                    "another network."
                )
        _check_alike(first.config, second.config)
        with torch.device("meta"):
            twins = cls(TwinDualEncoderConfig(first_config=first.config, second_config=second.config))
        twins.first, twins.second = first, second
        return twins.train(first.training)

    @property
    def networks(self) -> tuple[PreTrainedModel, PreTrainedModel]:
        """The two dual encoders."""
        return self.first, self.second

    def forward(self, **inputs: Any) -> CLIPOutput:
        """Run both networks on the same images and captions.

        Args:
            **inputs: Inputs of a CLIP model.

        Returns:
            Outputs of a CLIP model: `image_embeds` and `text_embeds` `(B, 2D)`, and logits `(B, B)` by the mean of the
            similarities and of the scales.
        """
        outputs = [network(**inputs) for network in self.networks]
        images = _concatenate([output.image_embeds for output in outputs])
        texts = _concatenate([output.text_embeds for output in outputs])
        scales, _ = logit_scale_and_bias(self)
        logits_per_text = texts @ images.T * scales.mean()
        return CLIPOutput(
            logits_per_image=logits_per_text.T, logits_per_text=logits_per_text, text_embeds=texts, image_embeds=images
        )

    def get_image_features(self, **inputs: Any) -> torch.Tensor:
        """Embed images: `(B, 2D)` of unit length."""
        return _concatenate(
            [_compute_features(cast(Any, network).get_image_features, inputs) for network in self.networks]
        )

    def get_text_features(self, **inputs: Any) -> torch.Tensor:
        """Embed captions: `(B, 2D)` of unit length."""
        return _concatenate(
            [_compute_features(cast(Any, network).get_text_features, inputs) for network in self.networks]
        )


def split_embeddings(embeds: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    """Split concatenated embeddings into those of each network.

    Args:
        embeds: Embeddings `(B, count * D)` of unit length.
        count: Number of networks.

    Returns:
        Embeddings `(B, D)` of unit length for each network.
    """
    return (embeds,) if count == 1 else tuple(part * math.sqrt(count) for part in embeds.chunk(count, dim=-1))


def _concatenate(embeds: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([nn.functional.normalize(part, dim=-1) for part in embeds], dim=-1) / math.sqrt(len(embeds))


def _compute_features(encode: Callable[..., Any], inputs: dict[str, Any]) -> torch.Tensor:
    output = encode(**inputs)
    return output if isinstance(output, torch.Tensor) else output.pooler_output


def _check_alike(first: PreTrainedConfig, second: PreTrainedConfig) -> None:
    read = {
        "vision_config": ("image_size", "num_channels", "hidden_size")
        if first.vision_config.model_type == "precomputed_features"
        else ("image_size", "num_channels"),
        "text_config": ("vocab_size",),
    }
    pairs = {"projection_dim": (getattr(first, "projection_dim", None), getattr(second, "projection_dim", None))}
    for part, names in read.items():
        for name in names:
            one, other = (getattr(getattr(each, part), name, None) for each in (first, second))
            pairs[f"{part}.{name}"] = one, other
    for name, (one, other) in pairs.items():
        if one != other:
            raise ValueError(f"The two networks differ in {name} ({one} and {other}); choose two that agree in it.")


# `exist_ok`, because a module may be imported twice (a reloading notebook, a spawned worker's second path).
AutoConfig.register(TwinDualEncoderConfig.model_type, TwinDualEncoderConfig, exist_ok=True)
AutoModel.register(TwinDualEncoderConfig, TwinDualEncoder, exist_ok=True)
AutoModelForZeroShotImageClassification.register(TwinDualEncoderConfig, TwinDualEncoder, exist_ok=True)
