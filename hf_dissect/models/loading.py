"""Loading or building the dual encoder to train, and the check that a checkpoint fits it."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoModel,
    AutoProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    VisionTextDualEncoderProcessor,
)
from transformers.utils import cached_file

from hf_dissect.models.adapters import check_same_adapter, is_adapter, load_adapter
from hf_dissect.models.families import (
    TOWERS,
    bare_model,
    check_dual_encoder,
    clamp_logit_scale_,
    find_loss_kind,
    find_max_text_length,
    find_text_padding,
    freeze_tower,
    list_networks,
    logit_scale_and_bias,
    logit_scale_parameter,
)
from hf_dissect.models.feature_encoder import find_feature_size
from hf_dissect.models.from_scratch import build_model_and_processor
from hf_dissect.models.open_clip import is_open_clip, load_open_clip
from hf_dissect.models.pretrained_parts import LOADING_ERRORS, load_image_processor, load_tokenizer, loading_error
from hf_dissect.models.renamed_weights import restore_weights
from hf_dissect.models.sentence_layout import find_encoder_folder
from hf_dissect.models.two_towers import build_from_towers

__all__ = [
    "bare_model",
    "check_dual_encoder",
    "clamp_logit_scale_",
    "find_loss_kind",
    "freeze_tower",
    "load_model_and_processor",
    "logit_scale_and_bias",
    "logit_scale_parameter",
    "find_max_text_length",
    "list_networks",
    "check_same_architecture",
    "find_text_padding",
    "LOADING_ERRORS",
    "restore_weights",
]


def load_model_and_processor(
    *,
    name_or_path: str | None = None,
    config: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
    text: Mapping[str, Any] | None = None,
    projection_dim: int | None = None,
    tokenizer: str | None = None,
    vocab_size: int = 4096,
    captions: Iterable[str] | None = None,
    max_caption_length: int | None = None,
    freeze: str | None = None,
    trust_remote_code: bool = False,
    feature_sizes: Mapping[str, int] | None = None,
) -> tuple[PreTrainedModel | PeftModel, Any]:
    """Load a trained dual encoder, build one of two trained towers, or build one from scratch.

    Args:
        name_or_path: Hub id or local folder of a trained model, also of one that sentence-transformers or open_clip
            saved, or of a PEFT adapter, which is loaded with its base and stays trainable. Weights are loaded in
            float32, which training needs.
        config: Configuration, with `model_type`, of a model with random weights (see `build_model_and_processor`).
            Exactly one of `name_or_path`, `config`, and `vision` with `text` is given.
        vision: Vision tower of a new dual encoder, see `load_vision_tower`.
        text: Text tower of a new dual encoder, see `load_text_tower`.
        projection_dim: Dimension of the embeddings of a dual encoder of two towers; None for 512.
        tokenizer: Hub id or local folder of a tokenizer; None for the model's own, or for one trained on `captions` if
            the model is built from `config`.
        vocab_size: Largest number of tokens of a trained tokenizer.
        captions: Texts to train a tokenizer on; not read if there is a tokenizer.
        max_caption_length: Number of tokens after which a caption is cut, special tokens included; None for as many as
            the text tower can read. The tokenizer keeps it as `model_max_length`, so that it is saved with the
            processor.
        freeze: Tower to freeze, `"vision"` or `"text"` (see `freeze_tower`); None for neither.
        trust_remote_code: True to allow code from the model's repository to run.
        feature_sizes: Dimensions of the stored features that the towers of `vision` and `text` read, by `"vision"` and
            `"text"`.

    Returns:
        The model in evaluation mode and its processor: the tokenizer alone if the images are stored features, the
        image processor alone if the captions are, None if both are.

    Raises:
        ValueError: If an argument is wrong, the configuration is at fault, or the model is not a dual encoder.
        OSError: If the model, its weights or its tokenizer cannot be read or downloaded.
    """
    has_towers = vision is not None or text is not None
    if [name_or_path is not None, config is not None, has_towers].count(True) != 1:
        raise ValueError(
            f"exactly one of name_or_path and config must be given, or else vision and text, got "
            f"name_or_path={name_or_path!r}, config={config!r}, vision={vision!r} and text={text!r}"
        )
    if has_towers and (vision is None or text is None or trust_remote_code):
        _refuse_towers(vision, text)
    if projection_dim is not None and not has_towers:
        raise ValueError(f"projection_dim={projection_dim} is only for a model of two towers; leave it out")
    if freeze is not None and freeze not in TOWERS:
        raise ValueError(f"freeze must be one of {', '.join(TOWERS)} or None, got {freeze!r}")
    if max_caption_length is not None and max_caption_length < 3:
        raise ValueError(
            "max_caption_length must be at least 3 (a start token, one of the caption, an end token), got "
            f"{max_caption_length}"
        )
    model: PreTrainedModel | PeftModel
    own_tokenizer = None if tokenizer is None else load_tokenizer(tokenizer, "tokenizer", trust_remote_code)
    if config is not None:
        model, processor = build_model_and_processor(
            config,
            tokenizer=own_tokenizer,
            captions=captions,
            vocab_size=vocab_size,
            max_caption_length=max_caption_length,
        )
    elif vision is not None and text is not None:
        model, processor = build_from_towers(
            vision, text, projection_dim=projection_dim, tokenizer=own_tokenizer, feature_sizes=feature_sizes
        )
    else:
        name = find_encoder_folder(str(name_or_path))
        if is_open_clip(name):
            model, processor = load_open_clip(name, own_tokenizer)
        else:
            model = _load_model(name, trust_remote_code)
            check_dual_encoder(model)
            processor = _load_processor(name, model, own_tokenizer, trust_remote_code)
    if find_feature_size(model, "text") is None:
        _limit_captions(model, processor, max_caption_length)
    if freeze is not None:
        freeze_tower(model, freeze)
    return model, processor


def _refuse_towers(vision: Any, text: Any) -> None:
    if vision is not None and text is not None:
        raise ValueError(
            "trust_remote_code (model.trust_remote_code in a recipe) is true, but two towers are rebuilt by the "
            "classes of transformers; set it to false, or load the whole dual encoder by name_or_path"
        )
    missing, given = ("text", "vision") if text is None else ("vision", "text")
    raise ValueError(
        f"{given} is given without {missing}; a dual encoder needs two towers (model.{missing} in a recipe)"
    )


def _load_model(name_or_path: str, trust_remote_code: bool) -> PreTrainedModel | PeftModel:
    folder = Path(name_or_path)
    if folder.is_dir() and not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise OSError(
            f"name_or_path {name_or_path!r} is a folder without a config.json, so it holds no saved model; give the "
            "folder of a run, one of its checkpoint-N folders, or any folder written by save_pretrained"
        )
    try:
        if is_adapter(name_or_path):
            return load_adapter(name_or_path, trust_remote_code)
        return AutoModel.from_pretrained(name_or_path, dtype=torch.float32, trust_remote_code=trust_remote_code)
    except LOADING_ERRORS as error:
        raise loading_error("name_or_path", name_or_path, error) from error


def _load_processor(
    name_or_path: str, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, trust_remote_code: bool
) -> Any:
    base_name = getattr(bare_model(model), "name_or_path", "")
    if isinstance(model, PeftModel) and base_name and not _holds_a_tokenizer(name_or_path):
        name_or_path = base_name  # an adapter saved without a processor uses that of its base
    reads_pictures, reads_texts = (find_feature_size(model, tower) is None for tower in ("vision", "text"))
    if not reads_texts:
        return load_image_processor(name_or_path, "name_or_path", trust_remote_code) if reads_pictures else None
    if not reads_pictures:
        return tokenizer or load_tokenizer(name_or_path, "name_or_path", trust_remote_code)
    try:
        processor = AutoProcessor.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    except LOADING_ERRORS:
        processor = None
    if not (hasattr(processor, "tokenizer") and hasattr(processor, "image_processor")):
        # A folder may hold the two parts without a file that joins them.
        image_processor = load_image_processor(name_or_path, "name_or_path", trust_remote_code)
        tokenizer = tokenizer or load_tokenizer(name_or_path, "name_or_path", trust_remote_code)
        processor = VisionTextDualEncoderProcessor(image_processor, tokenizer)
    if tokenizer is not None:
        processor.tokenizer = tokenizer
    return processor


def _holds_a_tokenizer(name_or_path: str) -> bool:
    return cached_file(name_or_path, "tokenizer_config.json", _raise_exceptions_for_missing_entries=False) is not None


def _limit_captions(model: nn.Module, processor: Any, max_caption_length: int | None) -> None:
    tokenizer = getattr(processor, "tokenizer", processor)
    config: Any = bare_model(model).config
    text_config = getattr(config, "text_config", config)
    if len(tokenizer) > getattr(text_config, "vocab_size", len(tokenizer)):
        raise ValueError(
            f"tokenizer has {len(tokenizer)} tokens, but the model's text tower knows only {text_config.vocab_size}; "
            "use the model's own tokenizer, or train from scratch (config)"
        )
    if max_caption_length is not None:
        limit = getattr(text_config, "max_position_embeddings", None) and find_max_text_length(model)
        if limit is not None and max_caption_length > limit:
            raise ValueError(
                f"max_caption_length must be at most {limit}, what the text tower can read, got {max_caption_length}"
            )
        tokenizer.model_max_length = max_caption_length
    tokenizer.model_max_length = find_max_text_length(model, tokenizer)


def check_same_architecture(model: nn.Module, checkpoint_folder: str | Path) -> None:
    """Check, before anything is loaded, that a checkpoint was written by a model like this one.

    Only the configuration and the headers of the weight files are read. Tensors are matched by name and shape; those
    left over on both sides are matched by shape alone, because transformers renames some tensors on saving. For a PEFT
    adapter, its own weights are compared. Sharded checkpoints (FSDP, DeepSpeed) are checked by their own loaders.

    Args:
        model: Model, wrapped or not, that the checkpoint is to be loaded into.
        checkpoint_folder: Folder that the Trainer or `save_pretrained` wrote.

    Raises:
        ValueError: If model type, names or shapes differ; the message names them.
        OSError: If the folder holds no checkpoint, or its files cannot be read.
    """
    folder = Path(checkpoint_folder)
    if (folder / "adapter_config.json").is_file():
        check_same_adapter(model, folder)
        return
    bare: Any = bare_model(model)
    saved_type = _read_json(folder / "config.json").get("model_type")
    if saved_type != bare.config.model_type:
        raise ValueError(
            f"checkpoint {str(folder)!r} holds a model of type {saved_type}, but the model to be trained is of type "
            f"{bare.config.model_type}; name a checkpoint of this run, or start again in another output_dir"
        )
    if any(folder.glob("pytorch_model_fsdp*")) or any(folder.glob("global_step*")):
        return
    saved = _read_shapes(folder)
    expected = {name: tuple(tensor.shape) for name, tensor in bare.state_dict().items()}
    missing = {name: shape for name, shape in expected.items() if saved.get(name) != shape}
    unexpected = {name: shape for name, shape in saved.items() if expected.get(name) != shape}
    if Counter(missing.values()) != Counter(unexpected.values()):
        raise ValueError(
            f"checkpoint {str(folder)!r} is of another model: it has {_format_shapes(unexpected)} where the model "
            f"to be trained has {_format_shapes(missing)}; name a checkpoint of this run, or start again in another "
            "output_dir"
        )


def _read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise OSError(
            f"checkpoint {str(folder)!r} has no model.safetensors, so its writing was interrupted or it is not a "
            "checkpoint; name an earlier checkpoint"
        )
    shapes = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as weights:
                shapes.update({name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()})
        except (SafetensorError, OSError) as error:
            raise OSError(f"weights {str(file)!r} cannot be read ({error}); name an earlier checkpoint") from error
    return shapes


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OSError(
            f"checkpoint {str(file.parent)!r} has no readable config.json ({error}); name a folder written by the "
            "Trainer or by save_pretrained"
        ) from error


def _format_shapes(shapes: Mapping[str, tuple[int, ...]]) -> str:
    if not shapes:
        return "nothing"
    first = ", ".join(f"{name} {list(shape)}" for name, shape in list(shapes.items())[:3])
    return first if len(shapes) <= 3 else f"{first} and {len(shapes) - 3} more"
