"""What remains at inference: an encoder of one modality with its heads, loaded like any transformers model."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

import hf_dissect.distillation.encoders  # noqa: F401  (makes the encoders known to AutoModel)


class StudentConfig(PreTrainedConfig):
    """Settings of `StudentForClassification`.

    Args:
        encoder_config: of the encoder, as a configuration or the content of a `config.json`.
        embedding_size: of the embeddings for retrieval; None takes the features themselves.

    Raises:
        ValueError: the encoder's configuration is missing or of an unknown type.
    """

    model_type = "distilled_student"
    sub_configs = {"encoder_config": AutoConfig}

    encoder_config: PreTrainedConfig | dict | None = None
    embedding_size: int | None = None

    def __post_init__(self, **kwargs) -> None:
        if self.encoder_config is None:
            raise ValueError("encoder_config is missing: the configuration of an encoder, with its model_type")
        if isinstance(self.encoder_config, dict):
            self.encoder_config = AutoConfig.for_model(**self.encoder_config)
        super().__post_init__(**kwargs)


@dataclass
class StudentOutput(ModelOutput):
    """Of `B` rows: `logits` `(B, num_labels)`, `embeds` `(B, E)` of unit length, `features` `(B, D)`, and a loss."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    embeds: torch.Tensor | None = None
    features: torch.Tensor | None = None


class TaskHeads(nn.Module):
    """A classifier and, for retrieval, a projection to embeddings of unit length.

    Args:
        feature_size: D.
        num_labels: C.
        embedding_size: E; None takes the features themselves.
    """

    def __init__(self, feature_size: int, num_labels: int, embedding_size: int | None = None):
        super().__init__()
        self.classifier = nn.Linear(feature_size, num_labels)
        self.projection = nn.Identity() if embedding_size is None else nn.Linear(feature_size, embedding_size)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits `(B, C)` and embeddings `(B, E)` of features `(B, D)`."""
        return self.classifier(features), nn.functional.normalize(self.projection(features).float(), dim=-1)


class StudentForClassification(PreTrainedModel):
    """An encoder with a classifier and embeddings: all that is needed once the training modalities are gone.

    The encoder alone is `model.encoder`, an ordinary model of its own class.
    """

    config: StudentConfig
    config_class = StudentConfig
    base_model_prefix = "encoder"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: StudentConfig):
        super().__init__(config)
        self.encoder = AutoModel.from_config(config.encoder_config)
        self.heads = TaskHeads(feature_size(self.encoder), config.num_labels, config.embedding_size)
        self.post_init()

    @classmethod
    def of(
        cls, encoder: PreTrainedModel, labels: list[str], embedding_size: int | None = None
    ) -> "StudentForClassification":
        """Put new heads on an encoder, which is not copied; `labels` are the names of the classes."""
        names = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
        config = StudentConfig(encoder_config=encoder.config, embedding_size=embedding_size, **names)
        with torch.device("meta"):
            student = cls(config)
        student.encoder = encoder
        student.heads = TaskHeads(feature_size(encoder), len(labels), embedding_size)
        return student

    @property
    def main_input_name(self) -> str:
        return self.encoder.main_input_name

    def forward(self, labels: torch.Tensor | None = None, return_dict: bool | None = None, **inputs) -> StudentOutput:
        """Classify and embed.

        Args:
            labels: int64 `(B,)`; with them the output has the mean cross-entropy as `loss`.
            inputs: of the encoder.
        """
        features = features_of(self.encoder, inputs)
        logits, embeds = self.heads(features)
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
        output = StudentOutput(loss=loss, logits=logits, embeds=embeds, features=features)
        return output.to_tuple() if return_dict is False else output


def features_of(encoder: PreTrainedModel, inputs: dict) -> torch.Tensor:
    """What an encoder says of each input, `(B, D)`: its pooled output, or else the mean over its positions."""
    output = encoder(**inputs)
    pooled = output.get("pooler_output")
    return output.last_hidden_state.mean(1) if pooled is None else pooled.flatten(1)


def feature_size(encoder: PreTrainedModel) -> int:
    """D of `features_of`.

    Raises:
        ValueError: the configuration does not tell it.
    """
    config = encoder.config
    size = getattr(config, "hidden_size", None) or (getattr(config, "hidden_sizes", None) or [None])[-1]
    if size is None:
        raise ValueError(
            f"{type(encoder).__name__} does not tell the size of its features (hidden_size); pass an encoder of one "
            "modality, such as CLIPVisionModel, ViTModel, BertModel or those of hf_dissect.distillation"
        )
    return size


AutoConfig.register(StudentConfig.model_type, StudentConfig, exist_ok=True)
AutoModel.register(StudentConfig, StudentForClassification, exist_ok=True)
AutoModelForImageClassification.register(StudentConfig, StudentForClassification, exist_ok=True)
