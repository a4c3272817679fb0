"""Loading a trained vision tower for a dual encoder, and the choice of its pooled output."""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from hf_dissect.models.adapters import is_adapter
from hf_dissect.models.dual_encoder import DualEncoder
from hf_dissect.models.families import TOWERS
from hf_dissect.models.feature_encoder import PrecomputedFeaturesConfig, PrecomputedFeaturesModel
from hf_dissect.models.pretrained_parts import LOADING_ERRORS, find_file, load_image_processor, loading_error
from hf_dissect.models.timm_towers import check_timm, find_timm_repository, make_timm_image_processor
from hf_dissect.models.towers import drop_unused_pooler, find_tower_class, pool_images


class Tower(NamedTuple):
    """A tower and the rest that a dual encoder needs of it.

    Attributes:
        model: Tower, in evaluation mode.
        pooling: Pooling of its output, see `DualEncoderConfig`.
        size: Dimension of its pooled output.
        processor: Its image processor or tokenizer; None for stored features.
    """

    model: PreTrainedModel
    pooling: str
    size: int
    processor: Any = None


def load_vision_tower(settings: Mapping[str, Any], feature_size: int | None = None) -> Tower:
    """Load the vision tower of a section `model.vision`, see `load_vision_model`.

    Args:
        settings: One of `name_or_path` (Hub id or local folder), `timm` (name) and `features` (True).
        feature_size: Dimension of the stored features.

    Raises:
        ValueError: If the settings are wrong, or the model is not a vision tower or has weights missing.
        OSError: If files cannot be read or downloaded.
    """
    if settings.get("features"):
        return load_feature_tower("vision", feature_size)
    if settings.get("timm"):
        given = settings["timm"]
        return load_vision_model(find_timm_repository(given), "model.vision.timm", given)
    return load_vision_model(settings["name_or_path"], "model.vision.name_or_path")


def load_vision_model(name: str, where: str, given: str | None = None) -> Tower:
    """Load a vision model, or the vision tower of a CLIP-like one, with its image processor.

    The tower's own pooled output is used if all of its weights are in the checkpoint. A classifier often has none for
    the pooling layer, which would then be random; the first token takes its place. A tower that pools nothing gives
    the mean over its tokens or positions.

    Args:
        name: Hub id or local folder.
        where: Setting that names it, for errors.
        given: Value of that setting; None if it is `name`.

    Raises:
        ValueError: If the model is not a vision tower or has weights missing.
        OSError: If files cannot be read or downloaded.
    """
    given = name if given is None else given
    config = read_tower_config(name, where)
    if config.model_type == "timm_wrapper":
        check_timm(where, given)
        config.do_pooling = True
    model, missing, whole = load_tower(name, config, "vision", where)
    unpooled = [key for key in missing if "pooler" not in key]
    check_nothing_is_missing(unpooled, name, where)
    pooling = whole.config.vision_pooling if isinstance(whole, DualEncoder) else None
    processor = load_vision_processor(name, model.config, where)
    pixels = _make_pixels(processor, f"{where} {given!r}")
    with torch.no_grad():
        output = _run(model, pixels, f"{where} {given!r}")
        pooling = pooling or _choose_pooling(model, output, has_random_pooler=len(missing) > len(unpooled))
        drop_unused_pooler(model, pooling)
        first, second = (pool_images(_run(model, pixels, where), pooling) for _ in range(2))
    if first.dim() != 2 or not torch.equal(first, second):
        raise ValueError(
            f"{where} {given!r} ({type(model).__name__}) does not give one vector a picture that stays the same from "
            "pass to pass (a masked autoencoder hides other patches each time); choose another tower"
        )
    return Tower(model.eval(), pooling, first.shape[1], processor)


def load_feature_tower(side: str, size: int | None) -> Tower:
    """Return a tower of stored features; `side` is `"vision"` or `"text"`.

    Raises:
        ValueError: If there are no stored features.
    """
    if size is None:
        what, column = ("images", "image") if side == "vision" else ("captions", "text")
        raise ValueError(
            f"model.{side}.features is true, but the data have no stored features of the {what}; name a .npz file "
            f"with data.{column}_features, or set model.{side}.name_or_path"
        )
    model = PrecomputedFeaturesModel(PrecomputedFeaturesConfig(hidden_size=size)).eval()
    return Tower(model, "pooler", size)


def read_tower_config(name: str, where: str, **place: Any) -> Any:
    """Read the configuration of a tower.

    Args:
        name: Hub id or local folder.
        where: Setting that names it, for errors.
        **place: Keywords of `from_pretrained`, such as `subfolder`.

    Raises:
        ValueError: If there is none, or it is that of an adapter.
        OSError: If it cannot be read or downloaded.
    """
    try:
        if is_adapter(name):
            raise ValueError(
                "it holds an adapter; merge it into its base first (merge_and_unload, then save_pretrained)"
            )
        return AutoConfig.from_pretrained(name, **place)
    except LOADING_ERRORS as error:
        raise loading_error(where, name, error) from error


def load_tower(
    name: str, config: PreTrainedConfig, side: str, where: str, **place: Any
) -> tuple[PreTrainedModel, list[str], Any]:
    """Load a tower, in float32; of a dual encoder such as CLIP, the tower of that side.

    Args:
        name: Hub id or local folder.
        config: Its configuration.
        side: `"vision"` or `"text"`.
        where: Setting that names it, for errors.
        **place: Keywords of `from_pretrained`, such as `subfolder`.

    Returns:
        The tower, the names of its tensors that are not in the checkpoint, and the dual encoder it was taken from, if
        any.
    """
    is_dual = hasattr(config, "vision_config") and hasattr(config, "text_config")
    try:
        kind = AutoModel if is_dual else find_tower_class(config)
        loaded, info = kind.from_pretrained(
            name, config=config, dtype=torch.float32, output_loading_info=True, **place
        )
    except LOADING_ERRORS as error:
        raise loading_error(where, name, error) from error
    missing = sorted(info["missing_keys"])
    if not is_dual:
        _check_modality(loaded, side, f"{where} {name!r}")
        return loaded.eval(), missing, None
    places = [part for part in TOWERS[side] if isinstance(getattr(loaded, part, None), PreTrainedModel)]
    if not places:
        raise ValueError(f"{where} {name!r} ({type(loaded).__name__}) has no {side} tower that can be taken out of it")
    tower, prefix = getattr(loaded, places[0]), f"{places[0]}."
    return tower.eval(), [key.removeprefix(prefix) for key in missing if key.startswith(prefix)], loaded


def _check_modality(model: PreTrainedModel, side: str, what: str) -> None:
    reads, other = ("pixel_values", "text") if side == "vision" else ("input_ids", "vision")
    if model.main_input_name != reads:
        raise ValueError(
            f"{what} ({type(model).__name__}) reads {model.main_input_name}, but a {side} tower reads {reads}"
            + (f"; name it with model.{other}" if model.main_input_name in ("pixel_values", "input_ids") else "")
        )


def check_nothing_is_missing(missing: list[str], name: str, where: str) -> None:
    """Check that the checkpoint of a tower has all of its weights.

    Raises:
        ValueError: If some are missing, which would be random.
    """
    if missing:
        first = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise ValueError(
            f"{where} {name!r} has no weights for {first}, so that these layers would be random; choose a complete "
            "checkpoint"
        )


def load_vision_processor(name: str, config: PreTrainedConfig, where: str) -> Any:
    """Load the image processor of a vision model, or make that of a model of timm, which saves none.

    Args:
        name: Hub id or local folder.
        config: Configuration of the model.
        where: Setting that names it, for errors.

    Raises:
        ValueError: If there is none.
        OSError: If it cannot be read or downloaded.
    """
    own = any(map(partial(find_file, name), ("preprocessor_config.json", "processor_config.json")))
    if config.model_type == "timm_wrapper" and not own:
        return make_timm_image_processor(getattr(config, "pretrained_cfg", None), f"{where} {name!r}")
    return load_image_processor(name, where)


def _make_pixels(processor: Any, what: str) -> dict[str, torch.Tensor]:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    pixels = dict(processor(images=[Image.fromarray(noise)], return_tensors="pt"))
    allowed = {"pixel_values", "pixel_attention_mask", "spatial_shapes"}
    if "pixel_values" not in pixels or set(pixels) - allowed:
        raise ValueError(f"{what} has an image processor that gives {', '.join(pixels)} in place of pixel_values")
    return pixels


def _run(model: PreTrainedModel, pixels: Mapping[str, torch.Tensor], what: str) -> Any:
    try:
        return model(**pixels, return_dict=True)
    except Exception as error:  # a model of another modality fails anywhere, with any exception
        raise ValueError(
            f"{what} ({type(model).__name__}) does not encode pictures: {type(error).__name__}: {error}"
        ) from error


def _choose_pooling(model: PreTrainedModel, output: Any, *, has_random_pooler: bool) -> str:
    pooled = output.get("pooler_output")
    if pooled is not None and not has_random_pooler and pooled.flatten(1).dim() == 2:
        return "pooler"
    return "cls" if has_random_pooler and output.last_hidden_state.dim() == 3 else "mean"
