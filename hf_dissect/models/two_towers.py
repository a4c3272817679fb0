"""Building a dual encoder of two trained towers, or of stored features, and its processor."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase, VisionTextDualEncoderProcessor

from hf_dissect.models.dual_encoder import DualEncoder
from hf_dissect.models.text_towers import load_text_tower
from hf_dissect.models.vision_towers import load_vision_tower

DEFAULT_PROJECTION = 512
TOWER_SETTINGS = {"vision": ("name_or_path", "timm", "features"), "text": ("name_or_path", "features", "pooling")}
POOLINGS = ("mean", "cls", "eot")


def build_from_towers(
    vision: Mapping[str, Any],
    text: Mapping[str, Any],
    *,
    projection_dim: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    feature_sizes: Mapping[str, int] | None = None,
) -> tuple[DualEncoder, Any]:
    """Build a dual encoder of two towers, with new projections drawn from torch's global generator.

    Args:
        vision: Section `model.vision` of a recipe, see `load_vision_tower`.
        text: Section `model.text` of a recipe, see `load_text_tower`.
        projection_dim: Dimension of the embeddings; None for `DEFAULT_PROJECTION`.
        tokenizer: Tokenizer of the captions; None for that of the text tower.
        feature_sizes: Dimensions of the stored features of images and captions, `"vision"` and `"text"`.

    Returns:
        The model in evaluation mode and its processor: the tokenizer alone if the images are stored features, the
        image processor alone if the captions are, None if both are.

    Raises:
        ValueError: If a setting is wrong, or a model does not suit as the tower it is named for.
        OSError: If files cannot be read or downloaded.
    """
    for side, settings in (("vision", vision), ("text", text)):
        _check_settings(side, settings)
    if projection_dim is not None and projection_dim < 1:
        raise ValueError(f"model.projection_dim must be at least 1, got {projection_dim}")
    sizes = feature_sizes or {}
    texts = load_text_tower(text, sizes.get("text"), tokenizer)
    images = load_vision_tower(vision, sizes.get("vision"))
    model = DualEncoder.of(
        images.model,
        texts.model,
        vision_size=images.size,
        text_size=texts.size,
        vision_pooling=images.pooling,
        text_pooling=texts.pooling,
        projection_dim=projection_dim or DEFAULT_PROJECTION,
    )
    if images.processor is None or texts.processor is None:
        return model.eval(), images.processor or texts.processor
    return model.eval(), VisionTextDualEncoderProcessor(images.processor, texts.processor)


def _check_settings(side: str, settings: Any) -> None:
    where, allowed = f"model.{side}", TOWER_SETTINGS[side]
    sources = [name for name in allowed if name != "pooling"]
    if not isinstance(settings, Mapping):
        raise ValueError(f"{where} must be a mapping with {', '.join(sources)}, got {settings!r}")
    for name in settings:
        if name not in allowed:
            raise ValueError(f"{where}.{name} is not a setting; allowed: {', '.join(allowed)}")
    given = [name for name in sources if settings.get(name)]
    if len(given) != 1:
        raise ValueError(
            f"{where} must have exactly one of {', '.join(sources)}, got {', '.join(given) or 'none of them'}"
        )
    pooling = settings.get("pooling")
    if pooling is not None and (pooling not in POOLINGS or settings.get("features")):
        raise ValueError(
            f"{where}.pooling must be one of {', '.join(POOLINGS)}, or null, and is only for a tower that reads "
            f"tokens, got {pooling!r}"
        )
