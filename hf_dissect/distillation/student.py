"""The part of a distillation that inference needs: an encoder of one modality with heads, an ordinary model."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

import hf_dissect.distillation.encoders  # noqa: F401  (registers the encoders with AutoModel)


class StudentConfig(PreTrainedConfig):
    """Settings of `StudentForClassification`.

    Args:
        encoder_config: Settings of the encoder, as a configuration or the content of a `config.json`.
        embedding_size: Size of the embeddings for retrieval; None to use the features themselves.

    Raises:
        ValueError: The encoder's configuration is missing or of an unknown type.
    """

    model_type = "distilled_student"
    sub_configs = {"encoder_config": AutoConfig}

    encoder_config: PreTrainedConfig | dict | None = None
    embedding_size: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.encoder_config is None:
            raise ValueError("encoder_config is missing: the configuration of an encoder, with its model_type")
        if isinstance(self.encoder_config, dict):
            self.encoder_config = AutoConfig.for_model(**self.encoder_config)
        super().__post_init__(**kwargs)


@dataclass
class StudentOutput(ModelOutput):
    """Output of `StudentForClassification` for `B` rows.

    Args:
        loss: Mean cross-entropy, a scalar; None without labels.
        logits: Scores of the classes, `(B, num_labels)`.
        embeds: Embeddings of unit length, `(B, E)`.
        features: Features of the encoder, `(B, D)`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    embeds: torch.Tensor | None = None
    features: torch.Tensor | None = None


class TaskHeads(nn.Module):
    """Classifier, and projection to embeddings of unit length for retrieval.

    Args:
        feature_size: Size `D` of the features.
        num_labels: Number `C` of classes.
        embedding_size: Size `E` of the embeddings; None to use the features themselves.
    """

    def __init__(self, feature_size: int, num_labels: int, embedding_size: int | None = None) -> None:
        super().__init__()
        self.classifier = nn.Linear(feature_size, num_labels)
        self.projection = nn.Identity() if embedding_size is None else nn.Linear(feature_size, embedding_size)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits `(B, C)` and embeddings `(B, E)` of features `(B, D)`."""
        return self.classifier(features), nn.functional.normalize(self.projection(features).float(), dim=-1)


class StudentForClassification(PreTrainedModel):
    """Encoder with a classifier and embeddings, which needs none of the training modalities.

    The encoder alone is `model.encoder`, an ordinary model of its own class.

    Args:
        config: Settings of the student.
    """

    config: StudentConfig
    config_class = StudentConfig
    base_model_prefix = "encoder"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: StudentConfig) -> None:
        super().__init__(config)
        self.encoder = AutoModel.from_config(config.encoder_config)
        self.heads = TaskHeads(find_feature_size(self.encoder), cast(int, config.num_labels), config.embedding_size)
        self.post_init()

    @classmethod
    def of(
        cls, encoder: PreTrainedModel, labels: list[str], embedding_size: int | None = None
    ) -> "StudentForClassification":
        """Put new heads on an encoder.

        Args:
            encoder: Encoder, which is used and not copied.
            labels: Names of the classes.
            embedding_size: Size of the embeddings; None to use the features themselves.
        """
        config = StudentConfig(
            encoder_config=encoder.config,
            embedding_size=embedding_size,
            id2label=dict(enumerate(labels)),
            label2id={name: number for number, name in enumerate(labels)},
        )
        with torch.device("meta"):
            student = cls(config)
        student.encoder = encoder
        student.heads = TaskHeads(find_feature_size(encoder), len(labels), embedding_size)
        return student

    @property
    def labels(self) -> list[str]:
        """Names of the classes, in the order of their numbers."""
        names = cast(dict[int, str], self.config.id2label)
        return [names[number] for number in range(len(names))]

    @property
    def main_input_name(self) -> str:  # type: ignore[override]  # a constant of other models; here the encoder's
        """Keyword of the encoder that takes the values."""
        return self.encoder.main_input_name

    def forward(
        self, labels: torch.Tensor | None = None, return_dict: bool | None = None, **inputs: Any
    ) -> StudentOutput | tuple[torch.Tensor, ...]:
        """Classify and embed `B` rows.

        Args:
            labels: Classes, int64 `(B,)`, for the loss; None for no loss.
            return_dict: False for a tuple instead of a `StudentOutput`.
            **inputs: Arguments of the encoder.
        """
        features = extract_features(self.encoder, inputs)
        logits, embeds = self.heads(features)
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
        output = StudentOutput(loss=loss, logits=logits, embeds=embeds, features=features)
        return output.to_tuple() if return_dict is False else output


def extract_features(encoder: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """Run an encoder and return its pooled output, or else the mean over its positions.

    Args:
        encoder: Encoder of one modality.
        inputs: Arguments of the encoder, for `B` rows.

    Returns:
        Features `(B, D)`.
    """
    output = encoder(**inputs)
    pooled = output.get("pooler_output")
    return output.last_hidden_state.mean(1) if pooled is None else pooled.flatten(1)


def find_feature_size(encoder: PreTrainedModel) -> int:
    """Return the size `D` of the features of an encoder.

    Raises:
        ValueError: The configuration does not say it.
    """
    config = encoder.config
    size = getattr(config, "hidden_size", None) or (getattr(config, "hidden_sizes", None) or [None])[-1]
    if size is None:
        raise ValueError(
            f"The configuration of {type(encoder).__name__} does not say the size of its features (hidden_size); pass "
            "an encoder of one modality, such as CLIPVisionModel, ViTModel, BertModel or those of "
            "hf_dissect.distillation"
        )
    return size


AutoConfig.register(StudentConfig.model_type, StudentConfig, exist_ok=True)
AutoModel.register(StudentConfig, StudentForClassification, exist_ok=True)
AutoModelForImageClassification.register(StudentConfig, StudentForClassification, exist_ok=True)
