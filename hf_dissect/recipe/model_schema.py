"""The section `model` of a recipe: the dual encoder that is trained, and its towers."""

import dataclasses
from typing import Any

from hf_dissect.settings import setting


@dataclasses.dataclass
class VisionTowerSection:
    """The vision tower of a dual encoder of two trained towers."""

    name_or_path: str | None = setting(
        None, "Hub id or folder of a trained vision model, or of a CLIP, of which the vision tower is taken."
    )
    timm: str | None = setting(None, "Name of a trained timm model, such as resnet50.a1_in1k; needs timm.")
    features: bool = setting(False, "The images are stored features, see data.image_features.")


@dataclasses.dataclass
class TextTowerSection:
    """The text tower of a dual encoder of two trained towers."""

    name_or_path: str | None = setting(
        None, "Hub id or folder of a trained text model, or of a CLIP, of which the text tower is taken."
    )
    pooling: str | None = setting(
        None,
        "Vector of a caption: the mean of its tokens, the first (cls) or the last of them (eot); null: as a "
        "sentence-transformers model was trained, eot for decoders, CLIP and SigLIP, mean for others.",
        choices=("mean", "cls", "eot"),
    )
    features: bool = setting(False, "The captions are stored features, see data.text_features.")


@dataclasses.dataclass
class ModelSection:
    """The dual encoder that is trained."""

    name_or_path: str | None = setting(None, "Hub id or folder of a trained model; this, config, or vision and text.")
    config: dict[str, Any] | None = setting(
        None, "Configuration (with model_type) of a model trained from scratch; this or name_or_path."
    )
    vision: VisionTowerSection | None = setting(
        None, "Trained vision tower, with one of name_or_path, timm and features; with text, in place of name_or_path."
    )
    text: TextTowerSection | None = setting(
        None, "Trained text tower, with name_or_path (and pooling) or features; with vision."
    )
    projection_dim: int | None = setting(
        None, "Dimension of the embeddings of vision and text; null: 512.", within="[1, inf)"
    )
    tokenizer: str | None = setting(
        None, "Hub id or folder of a tokenizer; null: the model's own, or one trained here."
    )
    vocab_size: int = setting(
        4096,
        "Size of the BPE vocabulary trained on the training captions (from scratch, no tokenizer).",
        within="[2, inf)",
    )
    max_caption_length: int | None = setting(
        None,
        "Tokens after which a caption is cut; null: the limit of the text tower.",
        within="[3, inf)",
        argument="max_caption_length",
    )
    caption_lengths: list[int] | None = setting(
        None,
        "Tokens that the captions of a batch are padded to: the first of these that is enough, or the limit; []: to "
        "the longest caption; null: with training.torch_compile 16, 32, 48, 64, 96, ..., else to the longest.",
        within="[1, inf)",
        argument="caption_lengths",
    )
    freeze: str | None = setting(
        None, "Tower whose weights stay fixed, and that gets no adapter; null: both train.", choices=("vision", "text")
    )
    trust_remote_code: bool = setting(False, "Allow code from the model's repository to run.")
    patch_dropout: float = setting(
        0.0,
        "Share of the patches of each picture that a ViT tower drops in training, drawn again for each picture and "
        "step (FLIP); none is dropped in scoring and evaluation.",
        within="[0, 1)",
        argument="patch_dropout",
    )
    second_name_or_path: str | None = setting(
        None,
        "Hub id or folder that the second network of objective.gsc.dual starts from; null: with config, one more of "
        "random weights.",
    )
    check_reload: bool = setting(
        True,
        "Before training, save the model to a temporary folder, load it, and warn if it gives other embeddings; "
        "models of more than a billion weights are not checked.",
        argument="check_reload",
    )
