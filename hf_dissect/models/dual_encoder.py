"""A dual encoder of any vision tower and any text tower, each pooled as its configuration says."""

import inspect
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
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPOutput, image_text_contrastive_loss

from hf_dissect.models.feature_encoder import find_feature_size
from hf_dissect.models.sentence_layers import (
    add_sentence_layers,
    apply_sentence_layers,
    check_sentence_layers,
    list_sentence_layers,
)
from hf_dissect.models.towers import (
    TEXT_POOLINGS,
    VISION_POOLINGS,
    drop_unused_pooler,
    make_text_tower,
    make_vision_tower,
    pool_images,
    pool_texts,
)


class DualEncoderConfig(PreTrainedConfig):
    """Configuration of a `DualEncoder`.

    Args:
        vision_config: Configuration of the vision tower, or the content of its `config.json`.
        text_config: Configuration of the text tower, or the content of its `config.json`.
        vision_size: Dimension of the pooled output of the vision tower.
        text_size: Dimension of the pooled output of the text tower, behind its dense layers if it has any.
        projection_dim: Dimension of the embeddings.
        vision_pooling: `"pooler"` for the tower's own pooled output, `"cls"` for its first token, `"mean"` for the
            mean over its tokens or over the positions of its last feature map.
        text_pooling: `"mean"` for the mean over the tokens that are not padding, `"cls"` for the first of them,
            `"eot"` for the last of them, `"pooler"` for the tower's own pooled output.
        logit_scale_init_value: Logarithm of the factor of the similarities at the start.
        text_layers: Settings of the dense layers between the pooling of the text tower and its projection, see
            `SentenceLayer`; None for none.

    Raises:
        ValueError: If a configuration is missing or of an unknown type, or a value is not allowed.
    """

    model_type = "dual_encoder"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}

    vision_config: PreTrainedConfig | dict[str, Any] | None = None
    text_config: PreTrainedConfig | dict[str, Any] | None = None
    vision_size: int = 512
    text_size: int = 512
    projection_dim: int = 512
    vision_pooling: str = "pooler"
    text_pooling: str = "mean"
    logit_scale_init_value: float | int = 2.6592
    text_layers: list[dict[str, Any]] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name in self.sub_configs:
            config = getattr(self, name)
            if config is None:
                raise ValueError(f"{name} is missing; give the configuration of a tower, with its model_type")
            if isinstance(config, dict):
                setattr(self, name, AutoConfig.for_model(**config))
        for name, allowed in (("vision_pooling", VISION_POOLINGS), ("text_pooling", TEXT_POOLINGS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("vision_size", "text_size", "projection_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        check_sentence_layers(self.text_layers)
        super().__post_init__(**kwargs)


class DualEncoder(PreTrainedModel):
    """A vision tower and a text tower, with a linear projection behind each, in the form of a CLIP model.

    The towers are models of transformers, a timm model in `TimmWrapperModel`, or `PrecomputedFeaturesModel` for stored
    features. An encoder-decoder gives its encoder.

    Args:
        config: Configuration of the towers and of their pooling.
    """

    config: DualEncoderConfig
    config_class = DualEncoderConfig
    base_model_prefix = "dual_encoder"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")  # type: ignore[assignment]  # a tuple in every model of transformers
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: DualEncoderConfig) -> None:
        super().__init__(config)
        self.vision_model = make_vision_tower(cast(PreTrainedConfig, config.vision_config))
        self.text_model = make_text_tower(cast(PreTrainedConfig, config.text_config))
        drop_unused_pooler(self.vision_model, config.vision_pooling)
        drop_unused_pooler(self.text_model, config.text_pooling)
        add_sentence_layers(self.text_model, config.text_layers)
        self.visual_projection = nn.Linear(config.vision_size, config.projection_dim, bias=False)
        self.text_projection = nn.Linear(config.text_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        self.post_init()

    @classmethod
    def of(cls, vision_model: PreTrainedModel, text_model: PreTrainedModel, **settings: Any) -> "DualEncoder":
        """Join two towers without a copy; the projections are drawn from torch's global generator.

        Args:
            vision_model: Vision tower.
            text_model: Text tower.
            **settings: The other fields of `DualEncoderConfig`.
        """
        settings = {"text_layers": list_sentence_layers(text_model), **settings}
        config = DualEncoderConfig(vision_config=vision_model.config, text_config=text_model.config, **settings)
        with torch.device("meta"):
            model = cls(config)
        model.vision_model, model.text_model = vision_model, text_model
        drop_unused_pooler(vision_model, config.vision_pooling)
        drop_unused_pooler(text_model, config.text_pooling)
        for name in ("visual_projection", "text_projection"):
            layer = getattr(model, name)
            new = nn.Linear(layer.in_features, layer.out_features, bias=False)
            nn.init.normal_(new.weight, std=layer.in_features**-0.5)
            setattr(model, name, new)
        model.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        return model.train(vision_model.training)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DualEncoder):
            for layer in (module.visual_projection, module.text_projection):
                init.normal_(layer.weight, std=layer.in_features**-0.5)
            init.constant_(module.logit_scale, float(self.config.logit_scale_init_value))

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        towers = [tower for tower in (self.vision_model, self.text_model) if tower.supports_gradient_checkpointing]
        for tower in towers:
            tower._set_gradient_checkpointing(enable, *args, **kwargs)
        if not towers:
            raise ValueError(
                f"gradient_checkpointing: neither tower ({type(self.vision_model).__name__} and "
                f"{type(self.text_model).__name__}) supports it; set it to false"
            )

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPooling | tuple[torch.Tensor, ...]:
        """Embed images.

        Args:
            pixel_values: Pictures `(B, 3, H, W)` in the form that the vision tower reads, or stored features
                `(B, vision_size)`.
            pixel_attention_mask: Mask of the patches, for SigLIP 2.
            spatial_shapes: Numbers of patches, for SigLIP 2.
            output_attentions: True for the attentions of the tower.
            output_hidden_states: True for the hidden states of the tower.
            return_dict: False to return a tuple.

        Returns:
            `pooler_output` `(B, projection_dim)`, the embeddings, and `last_hidden_state` of the tower.
        """
        given = {
            "pixel_attention_mask": pixel_attention_mask,
            "spatial_shapes": spatial_shapes,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
        }
        given = {name: value for name, value in given.items() if value is not None}
        output = self.vision_model(pixel_values=pixel_values, return_dict=True, **given)
        embeds = self.visual_projection(pool_images(output, self.config.vision_pooling))
        return _as_output(output, embeds, return_dict)

    def get_text_features(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        text_features: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPooling | tuple[torch.Tensor, ...]:
        """Embed captions.

        Args:
            input_ids: Tokens `(B, L)`.
            attention_mask: 0 at padding, `(B, L)`; None if there is none.
            token_type_ids: Segments `(B, L)`, for a tower that has any.
            position_ids: Positions `(B, L)`; None for those that the tower counts.
            text_features: Stored features `(B, text_size)`, for a text tower that reads those, in place of tokens.
            output_attentions: True for the attentions of the tower.
            output_hidden_states: True for the hidden states of the tower.
            return_dict: False to return a tuple.

        Returns:
            `pooler_output` `(B, projection_dim)`, the embeddings, and `last_hidden_state` of the tower.

        Raises:
            ValueError: If tokens are missing, or stored features for a tower that reads those.
        """
        config: Any = self.config.text_config
        reads_features = find_feature_size(self.config, "text") is not None
        if (text_features if reads_features else input_ids) is None:
            raise ValueError(
                f"text_features are missing: the text tower reads stored features of {config.hidden_size} numbers"
                if reads_features
                else "input_ids are missing: the text tower reads tokens"
            )
        if reads_features:
            output = self.text_model(pixel_values=text_features, return_dict=True)
            return _as_output(output, self.text_projection(output.pooler_output), return_dict)
        # A tower without segments would take them for tokens (GPT-2), or for an unknown argument (DistilBERT).
        segments = token_type_ids if getattr(config, "type_vocab_size", 0) else None
        given = {
            "attention_mask": attention_mask,
            "token_type_ids": segments,
            "position_ids": position_ids,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
        }
        read = inspect.signature(self.text_model.forward).parameters
        optional = ("token_type_ids",)
        given = {
            name: value
            for name, value in given.items()
            if value is not None and (name in read or name not in optional)
        }
        output = self.text_model(input_ids=input_ids, return_dict=True, **given)
        pooled = pool_texts(output, attention_mask, self.config.text_pooling)
        embeds = self.text_projection(apply_sentence_layers(self.text_model, pooled))
        return _as_output(output, embeds, return_dict)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        text_features: torch.Tensor | None = None,
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
        return_loss: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> CLIPOutput | tuple[Any, ...]:
        """Embed images and captions, and compare each with each; the arguments are those of the two methods above.

        Returns:
            Outputs of a CLIP model: `image_embeds` and `text_embeds` of unit length, `logits_per_image` and
            `logits_per_text`, and the contrastive `loss` with `return_loss`.

        Raises:
            ValueError: If the inputs of a tower are missing.
        """
        if pixel_values is None:
            raise ValueError("pixel_values are missing; to embed captions alone, use get_text_features")
        options = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        images: Any = self.get_image_features(pixel_values, pixel_attention_mask, spatial_shapes, **options)
        texts: Any = self.get_text_features(
            input_ids, attention_mask, token_type_ids, position_ids, text_features, **options
        )
        image_embeds = nn.functional.normalize(images.pooler_output, dim=-1)
        text_embeds = nn.functional.normalize(texts.pooler_output, dim=-1)
        logits_per_text = text_embeds @ image_embeds.T * self.logit_scale.exp()
        output = CLIPOutput(
            loss=image_text_contrastive_loss(logits_per_text) if return_loss else None,
            logits_per_image=logits_per_text.T,
            logits_per_text=logits_per_text,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=texts,
            vision_model_output=images,
        )
        return output.to_tuple() if return_dict is False else output


def _as_output(
    output: Any, embeds: torch.Tensor, return_dict: bool | None
) -> BaseModelOutputWithPooling | tuple[torch.Tensor, ...]:
    result = BaseModelOutputWithPooling(
        last_hidden_state=output.last_hidden_state,
        pooler_output=embeds,
        hidden_states=output.get("hidden_states"),
        attentions=output.get("attentions"),
    )
    return cast(tuple[torch.Tensor, ...], result.to_tuple()) if return_dict is False else result


# `exist_ok`, because a module may be imported twice (a reloading notebook, a spawned worker's second path).
AutoConfig.register(DualEncoderConfig.model_type, DualEncoderConfig, exist_ok=True)
AutoModel.register(DualEncoderConfig, DualEncoder, exist_ok=True)
AutoModelForZeroShotImageClassification.register(DualEncoderConfig, DualEncoder, exist_ok=True)
