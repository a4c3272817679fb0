"""Tokenizer and preparation of pictures of open_clip in the form of transformers, and the other way round."""

import gzip
import hashlib
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import Regex, normalizers
from transformers import CLIPTokenizer, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from hf_dissect.models.open_clip.configuration import NotConvertible
from hf_dissect.models.pretrained_parts import find_file, load_tokenizer

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CLIP_VOCABULARY = "ee7a4423aea96d705babd8004aa41e3696ffd366e5d8f3227d4fa057768d60e0"
"""Digest of the tokens of CLIP's own vocabulary, in the order of their numbers, without the two special ones."""
_SAMPLING = {"bicubic": 3, "bilinear": 2, "random": 3}  # numbers of Pillow; "random" is bicubic outside of training
_PUNCTUATION = r"[!-/:-@\[-`{-~]"


def build_image_processor(model_type: str, image_size: int, preprocess: Mapping[str, Any]) -> Any:
    """Build the image processor that the section `preprocess_cfg` describes.

    Args:
        model_type: `"clip"` or `"siglip"`.
        image_size: Height and width that the vision tower reads.
        preprocess: Content of the section; open_clip has a default for each setting.

    Raises:
        NotConvertible: transformers' processors do not prepare pictures in that way.
    """
    mode, sampling = preprocess.get("resize_mode") or "shortest", preprocess.get("interpolation") or "bicubic"
    if mode not in ("shortest", "squash"):
        raise NotConvertible(f"preprocess_cfg.resize_mode={mode!r}")
    if sampling not in _SAMPLING:
        raise NotConvertible(f"preprocess_cfg.interpolation={sampling!r}")
    if preprocess.get("mode", "RGB") != "RGB":
        raise NotConvertible(f"preprocess_cfg.mode={preprocess['mode']!r}")
    square = {"height": image_size, "width": image_size}
    settings: dict[str, Any] = {
        "image_mean": list(preprocess.get("mean") or CLIP_MEAN),
        "image_std": list(preprocess.get("std") or CLIP_STD),
        "resample": _SAMPLING[sampling],
        "do_convert_rgb": True,
    }
    if model_type == "siglip" and mode == "squash":
        return SiglipImageProcessorPil(size=square, **settings)
    if mode == "squash":
        return CLIPImageProcessorPil(size=square, do_center_crop=False, **settings)
    return CLIPImageProcessorPil(size={"shortest_edge": image_size}, crop_size=square, **settings)


def describe_image_processor(processor: Any, image_size: int) -> dict[str, Any]:
    """Describe an image processor as the section `preprocess_cfg`.

    Args:
        processor: Image processor of the model.
        image_size: Height and width that the vision tower reads.

    Raises:
        NotConvertible: open_clip does not prepare pictures in that way.
    """
    settings = processor.to_dict()
    size = {name: value for name, value in dict(settings.get("size") or {}).items() if value}
    crop = {name: value for name, value in dict(settings.get("crop_size") or {}).items() if value}
    square = {"height": image_size, "width": image_size}
    if settings.get("do_center_crop"):
        mode, fits = "shortest", size == {"shortest_edge": image_size} and crop == square
    else:
        mode, fits = "squash", size == square
    if not (settings.get("do_resize") and fits):
        raise NotConvertible(f"the image processor resizes to {size} and crops to {crop or 'nothing'}")
    samplings = {number: name for name, number in _SAMPLING.items() if name != "random"}
    if settings.get("resample") not in samplings:
        raise NotConvertible(f"the image processor has resample={settings.get('resample')}")
    if not settings.get("do_rescale") or abs(settings.get("rescale_factor", 0) * 255 - 1) > 1e-6:
        raise NotConvertible(f"the image processor has rescale_factor={settings.get('rescale_factor')}")
    normalises = settings.get("do_normalize", True)
    return {
        "size": image_size,
        "mode": "RGB",
        "mean": list(settings["image_mean"]) if normalises else [0.0, 0.0, 0.0],
        "std": list(settings["image_std"]) if normalises else [1.0, 1.0, 1.0],
        "interpolation": samplings[settings["resample"]],
        "resize_mode": mode,
        "fill_color": 0,
    }


def load_open_clip_tokenizer(name_or_path: str, text: Mapping[str, Any]) -> Any:
    """Load the tokenizer that the section `text_cfg` names, without a network where its files are at hand.

    Args:
        name_or_path: Hub id or local folder of the checkpoint.
        text: Content of the section.

    Raises:
        NotConvertible: Captions are prepared in a way that transformers' tokenizers do not know.
        ValueError: The vocabulary is not at hand.
        OSError: Its files cannot be read or downloaded.
    """
    given = dict(text.get("tokenizer_kwargs") or {})
    name = text.get("hf_tokenizer_name")
    clean = given.pop("clean", "whitespace" if name else "lower")
    if given:
        raise NotConvertible(f"text_cfg.tokenizer_kwargs={given!r}")
    if clean not in ("whitespace", "lower", "canonicalize"):
        raise NotConvertible(f"text_cfg.tokenizer_kwargs.clean={clean!r}")
    has_files = find_file(name_or_path, "tokenizer_config.json") is not None
    if name:
        tokenizer = load_tokenizer(name_or_path if has_files else name, "name_or_path")
    else:
        tokenizer = load_tokenizer(name_or_path, "name_or_path") if has_files else None
        if tokenizer is None or not has_clip_vocabulary(tokenizer):
            tokenizer = _load_clip_tokenizer(name_or_path)
    tokenizer = _clean_captions(tokenizer, clean)
    tokenizer.model_max_length = text.get("context_length", 77)
    return tokenizer


def has_clip_vocabulary(tokenizer: Any) -> bool:
    """Return True for a tokenizer with the tokens of CLIP's own vocabulary under their numbers."""
    vocabulary = tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)[:-2]
    return hashlib.sha256("\n".join(tokens).encode()).hexdigest() == CLIP_VOCABULARY


def _load_clip_tokenizer(name_or_path: str) -> CLIPTokenizer:
    package = find_spec("open_clip")
    file = Path(str(package.origin)).parent / "bpe_simple_vocab_16e6.txt.gz" if package else None
    if file is None or not file.is_file():
        raise ValueError(
            f"name_or_path {name_or_path!r} is a checkpoint of open_clip without a tokenizer: it reads CLIP's "
            "vocabulary, which is a part of open_clip; install open_clip_torch, or name a tokenizer with tokenizer "
            "(model.tokenizer in a recipe), such as openai/clip-vit-base-patch32"
        )
    lines = gzip.decompress(file.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    merges = [tuple(line.split()) for line in lines]
    letters = _list_byte_letters()
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(merge) for merge in merges)]
    ids = {token: number for number, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=ids, merges=merges)  # type: ignore[arg-type]  # pairs, as in its own default


def _list_byte_letters() -> list[str]:
    """Return the letter of each byte in the order of CLIP's vocabulary: printable bytes stand for themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = len(set(range(256)) - set(printable))
    return [chr(byte) for byte in printable] + [chr(256 + number) for number in range(others)]


def _clean_captions(tokenizer: Any, clean: str) -> Any:
    """Return a tokenizer that begins with open_clip's cleaning of captions.

    What open_clip does before, with ftfy and `html.unescape`, has no counterpart in a tokenizer file.
    """
    steps: list[Any] = [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    if clean == "lower":
        steps.append(normalizers.Lowercase())
    if clean == "canonicalize":
        without = [
            normalizers.Replace("_", " "),
            normalizers.Replace(Regex(_PUNCTUATION), ""),
            normalizers.Lowercase(),
        ]
        steps = [*without, *steps]
    elif isinstance(tokenizer, CLIPTokenizer):
        return tokenizer  # which does all of this by itself
    backend = tokenizer.backend_tokenizer
    own = [] if backend.normalizer is None else [backend.normalizer]
    backend.normalizer = normalizers.Sequence([*steps, *own])
    # A class such as T5Tokenizer would rebuild the normaliser without these steps.
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        padding_side=tokenizer.padding_side,
        model_input_names=list(tokenizer.model_input_names),
        **{name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)},
    )
