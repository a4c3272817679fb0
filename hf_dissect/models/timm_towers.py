"""Vision towers from timm: their names, their place on the Hub, and pictures prepared as they were trained."""

import difflib
import importlib
import importlib.util
import math
from collections.abc import Mapping
from typing import Any

from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.utils import is_timm_available

_RESAMPLING = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}
_DEFAULT_CROP = 0.875
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def check_timm(setting: str, value: str) -> None:
    """Check that timm can be imported.

    Args:
        setting: Setting that needs it, for the error.
        value: Value of the setting.

    Raises:
        ValueError: If timm or torchvision, which timm imports, is not installed or does not work.
    """
    wanted = f"{setting} {value!r} is a model of timm"
    if importlib.util.find_spec("timm") is None:
        raise ValueError(f"{wanted}, which is not installed; install it with: pip install timm")
    if not is_timm_available():
        raise ValueError(
            f"{wanted}, which needs torchvision; install the build that belongs to your PyTorch (pip install "
            "torchvision with the same --index-url)"
        )
    try:
        importlib.import_module("timm")
    except Exception as error:  # torchvision of another PyTorch fails with errors of many kinds
        raise ValueError(
            f"{wanted}, which cannot be imported ({type(error).__name__}: {error}); install the torchvision build "
            "that belongs to your PyTorch (pip install torchvision with the same --index-url)"
        ) from error


def find_timm_repository(name: str) -> str:
    """Return the repository on the Hub of a model of timm, such as `timm/resnet18.a1_in1k` for `resnet18`.

    Args:
        name: Name of an architecture, with or without the tag of its weights.

    Raises:
        ValueError: If timm is not installed, or has no such model or no weights of it on the Hub.
    """
    setting = "model.vision.timm"
    check_timm(setting, name)
    models: Any = importlib.import_module("timm.models")
    bare = name.removeprefix("timm/")
    if not models.is_model(bare):
        names = models.list_models()
        near = difflib.get_close_matches(bare.partition(".")[0], names, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"{setting} {name!r} is not a model of the installed timm (timm.list_models()){hint}")
    tagged = models.list_pretrained(f"{bare.partition('.')[0]}.*")
    config = models.get_pretrained_cfg(bare) if "." not in bare or bare in tagged else None
    repository = getattr(config, "hf_hub_id", None)
    if not repository:
        offered = f"; its trained weights are {', '.join(tagged)}" if tagged else ""
        raise ValueError(f"{setting} {name!r} has no trained weights on the Hub{offered}")
    return repository


def make_timm_image_processor(pretrained_cfg: Mapping[str, Any] | None, where: str) -> CLIPImageProcessorPil:
    """Build an image processor that prepares pictures as timm does for evaluation, without torchvision.

    The shorter side is resized to `input_size / crop_pct` and the middle cut out; a crop may lie one pixel away
    from that of torchvision.

    Args:
        pretrained_cfg: `pretrained_cfg` of a timm model, with `input_size`, `mean`, `std`, `interpolation`,
            `crop_pct` and `crop_mode`; what is missing has the value that timm gives it.
        where: Model, for errors.

    Raises:
        ValueError: If the pictures are not RGB or not square, or are prepared in another way.
    """
    given = dict(pretrained_cfg or {})
    channels, height, width = given.get("input_size") or (3, 224, 224)
    mode, interpolation = given.get("crop_mode") or "center", given.get("interpolation") or "bicubic"
    resampling = _RESAMPLING.get("bicubic" if interpolation == "random" else interpolation)
    if channels != 3 or height != width or mode not in ("center", "squash") or resampling is None:
        raise ValueError(
            f"{where} reads pictures of {channels} channels and {height} x {width} pixels, crop mode {mode!r} and "
            f"interpolation {interpolation!r}; only square RGB pictures with crop mode center or squash can be "
            "prepared: put a preprocessor_config.json of your own next to its config.json"
        )
    scaled = math.floor(height / (given.get("crop_pct") or _DEFAULT_CROP))
    return CLIPImageProcessorPil(
        size={"shortest_edge": scaled} if mode == "center" else {"height": scaled, "width": scaled},
        resample=resampling,
        do_center_crop=True,
        crop_size={"height": height, "width": width},
        image_mean=list(given.get("mean") or IMAGENET_MEAN),
        image_std=list(given.get("std") or IMAGENET_STD),
    )
