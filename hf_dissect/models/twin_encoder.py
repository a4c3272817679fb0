"""Two dual encoders that train side by side and answer together, by the mean of their similarities."""

import math
from collections.abc import Callable

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.models.clip.modeling_clip import CLIPOutput

from hf_dissect.models.families import check_dual_encoder, contrastive_kind, logit_scale_and_bias


class TwinDualEncoderConfig(PreTrainedConfig):
    """Settings of `TwinDualEncoder`.

    Args:
        first_config, second_config: of the two networks, as configurations or as the content of a `config.json`.

    Raises:
        ValueError: a configuration is missing or of an unknown type.
    """

    model_type = "twin_dual_encoder"
    sub_configs = {"first_config": AutoConfig, "second_config": AutoConfig}

    first_config: PreTrainedConfig | dict | None = None
    second_config: PreTrainedConfig | dict | None = None

    def __post_init__(self, **kwargs) -> None:
        for name in self.sub_configs:
            config = getattr(self, name)
            if config is None:
                raise ValueError(f"{name} is missing: the configuration of a dual encoder, with its model_type")
            if isinstance(config, dict):
                setattr(self, name, AutoConfig.for_model(**config))
        super().__post_init__(**kwargs)

    @property
    def vision_config(self) -> PreTrainedConfig:
        """Of the first network: both read the same images."""
        return self.first_config.vision_config

    @property
    def text_config(self) -> PreTrainedConfig:
        """Of the first network: both read the same tokens."""
        return self.first_config.text_config


class TwinDualEncoder(PreTrainedModel):
    """Two dual encoders, as co-teaching methods such as GSC+ train them, in the form of one.

    The embeddings are those of both side by side, each of unit length and divided by sqrt(2): they have unit length,
    too, and their cosine is the mean of the two cosines. `first` and `second` are models of their own, to be saved and
    used alone.
    """

    config: TwinDualEncoderConfig
    config_class = TwinDualEncoderConfig
    base_model_prefix = "twin"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: TwinDualEncoderConfig):
        super().__init__(config)
        self.first = AutoModel.from_config(config.first_config)
        self.second = AutoModel.from_config(config.second_config)
        self.post_init()

    @classmethod
    def of(cls, first: PreTrainedModel, second: PreTrainedModel) -> "TwinDualEncoder":
        """Join two models, which are not copied.

        Raises:
            ValueError: one is no dual encoder or trains with the sigmoid loss, they do not read the same images and
                tokens, or their embeddings differ in size.
        """
        for network in (first, second):
            check_dual_encoder(network)
            if contrastive_kind(network) != "softmax":
                raise ValueError(
                    f"{type(network).__name__} trains with the sigmoid loss; twins need the softmax loss."
                )
        _check_alike(first.config, second.config)
        with torch.device("meta"):
            twins = cls(TwinDualEncoderConfig(first_config=first.config, second_config=second.config))
        twins.first, twins.second = first, second
        return twins.train(first.training)

    @property
    def networks(self) -> tuple[PreTrainedModel, PreTrainedModel]:
        return self.first, self.second

    def forward(self, **inputs) -> CLIPOutput:
        """Both networks on the same images and captions; `inputs` and outputs are those of a CLIP model.

        Returns:
            `image_embeds` and `text_embeds` `(B, 2D)`; logits `(B, B)` by the mean of the similarities and of the
            scales.
        """
        outputs = [network(**inputs) for network in self.networks]
        images = _side_by_side([output.image_embeds for output in outputs])
        texts = _side_by_side([output.text_embeds for output in outputs])
        scales, _ = logit_scale_and_bias(self)
        logits_per_text = texts @ images.T * scales.mean()
        return CLIPOutput(
            logits_per_image=logits_per_text.T, logits_per_text=logits_per_text, text_embeds=texts, image_embeds=images
        )

    def get_image_features(self, **inputs) -> torch.Tensor:
        """Embeddings `(B, 2D)` of images, of unit length."""
        return _side_by_side([_features(network.get_image_features, inputs) for network in self.networks])

    def get_text_features(self, **inputs) -> torch.Tensor:
        """Embeddings `(B, 2D)` of captions, of unit length."""
        return _side_by_side([_features(network.get_text_features, inputs) for network in self.networks])


def embeddings_of_networks(embeds: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    """The embeddings `(B, D)` of each of `count` networks, of unit length, from those that stand side by side."""
    return (embeds,) if count == 1 else tuple(part * math.sqrt(count) for part in embeds.chunk(count, dim=-1))


def _side_by_side(embeds: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([nn.functional.normalize(part, dim=-1) for part in embeds], dim=-1) / math.sqrt(len(embeds))


def _features(encode: Callable, inputs: dict) -> torch.Tensor:
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
            pairs[f"{part}.{name}"] = tuple(getattr(getattr(each, part), name, None) for each in (first, second))
    for name, (one, other) in pairs.items():
        if one != other:
            raise ValueError(f"The two networks differ in {name} ({one} and {other}); choose two that agree in it.")


# `exist_ok`, because a module may be imported again (a reloading notebook, a spawned worker's second path).
AutoConfig.register(TwinDualEncoderConfig.model_type, TwinDualEncoderConfig, exist_ok=True)
AutoModel.register(TwinDualEncoderConfig, TwinDualEncoder, exist_ok=True)
