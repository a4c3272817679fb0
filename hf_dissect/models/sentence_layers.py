"""Dense layers that a sentence-transformers model has behind its pooling, as a part of the text tower."""

import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from hf_dissect.models.pretrained_parts import find_file

ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "SiLU", "Sigmoid", "LeakyReLU", "ELU", "SELU", "Softplus")
"""Activations of `torch.nn` behind a dense layer."""

_IN_TOWER = "sentence_layers"
_HOLDS_NO_WEIGHTS = ("Normalize", "Dropout")
_ELSEWHERE = ("Transformer", "Pooling")
_SETTINGS = {"in_features": int, "out_features": int, "bias": bool, "activation": str, "normalize_input": bool}
_KEYS = ("in_features", "out_features", "bias", "activation_function", "module_input_name", "module_output_name")
_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
_WAY_OUT = "name another text model, or train with a copy of its folder whose modules.json leaves this layer out"


class SentenceLayer(nn.Module):
    """Dense layer with an activation, on pooled texts `(B, in_features)`.

    Args:
        in_features: Dimension of the input.
        out_features: Dimension of the output.
        bias: True for a bias.
        activation: One of `ACTIVATIONS`, with its defaults in `torch.nn`.
        normalize_input: True to scale each input to unit length first.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool, activation: str, normalize_input: bool = False
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=bias)
        self.activation = getattr(nn, activation)()
        self.normalize_input = normalize_input

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        """Transform pooled texts."""
        pooled = nn.functional.normalize(pooled, dim=-1) if self.normalize_input else pooled
        return self.activation(self.linear(pooled))


def check_sentence_layers(layers: Any) -> None:
    """Check the settings of dense layers, see `SentenceLayer`.

    Raises:
        ValueError: A setting is missing, unknown or impossible, or two layers do not fit.
    """
    size = None
    for layer in layers or ():
        wrong = not isinstance(layer, Mapping) or {"normalize_input": False, **layer}.keys() != _SETTINGS.keys()
        if wrong or not all(isinstance(value, _SETTINGS[name]) for name, value in layer.items()):
            raise ValueError(f"text_layers must be mappings of {', '.join(_SETTINGS)}, got {layer!r}")
        if layer["activation"] not in ACTIVATIONS:
            raise ValueError(f"text_layers: activation must be one of {', '.join(ACTIVATIONS)}, got {layer!r}")
        if min(layer["in_features"], layer["out_features"]) < 1 or size not in (None, layer["in_features"]):
            raise ValueError(f"text_layers do not fit each other: {layers!r}")
        size = layer["out_features"]


def add_sentence_layers(tower: nn.Module, layers: Sequence[Mapping[str, Any]] | None) -> None:
    """Add dense layers with random weights to a text tower, in place, so that they are frozen and moved with it."""
    if layers:
        setattr(tower, _IN_TOWER, nn.Sequential(*(SentenceLayer(**layer) for layer in layers)))


def apply_sentence_layers(tower: nn.Module, pooled: torch.Tensor) -> torch.Tensor:
    """Apply the dense layers of a text tower, if it has any, to its pooled output `(B, D)`."""
    layers = getattr(tower, _IN_TOWER, None)
    return pooled if layers is None else layers(pooled)


def list_sentence_layers(tower: nn.Module) -> list[dict[str, Any]] | None:
    """Return the settings of the dense layers of a text tower; None if it has none."""
    if getattr(tower, _IN_TOWER, None) is None:
        return None
    return [
        {
            "in_features": layer.linear.in_features,
            "out_features": layer.linear.out_features,
            "bias": layer.linear.bias is not None,
            "activation": type(layer.activation).__name__,
            "normalize_input": layer.normalize_input,
        }
        for layer in getattr(tower, _IN_TOWER)
    ]


def load_sentence_layers(tower: nn.Module, name: str, modules: Sequence[Mapping[str, Any]], where: str) -> None:
    """Add the dense layers of a sentence-transformers model to its tower, in place, with their weights.

    A normalisation behind the last of them is left out: the projection that follows is linear, and its output is
    brought to unit length.

    Args:
        tower: Transformer of the model.
        name: Hub id or local folder.
        modules: Content of its `modules.json`; empty for another kind of model.
        where: Setting that names it, for errors.

    Raises:
        ValueError: A module is of a kind that is not offered, or its files are missing or do not fit.
    """
    layers: list[dict[str, Any]] = []
    weights: list[dict[str, torch.Tensor]] = []
    normalize = False
    for module in modules:
        kind = str(module.get("type", "")).rpartition(".")[2]
        what = f"{where} {name!r}: module {module.get('path') or module.get('name')!r} of its modules.json"
        if kind == "Dense":
            layers.append({**_read_settings(name, module["path"], what), "normalize_input": normalize})
            weights.append(_read_weights(name, module["path"], what))
        elif kind not in (*_ELSEWHERE, *_HOLDS_NO_WEIGHTS):
            raise ValueError(f"{what} is a {kind}, which is not offered; {_WAY_OUT}")
        normalize = kind == "Normalize" or (normalize and kind == "Dropout")
    add_sentence_layers(tower, layers)
    for layer, tensors in zip(getattr(tower, _IN_TOWER, ()), weights, strict=True):
        try:
            layer.load_state_dict(tensors)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{where} {name!r}: the weights of a dense layer do not fit ({reason})") from error


def _read_settings(name: str, folder: str, what: str) -> dict[str, Any]:
    path = find_file(name, f"{folder}/config.json")
    if path is None:
        raise ValueError(f"{what} has no config.json; the copy is incomplete")
    try:
        saved = json.loads(Path(path).read_text(encoding="utf-8"))
        unknown = [key for key, value in saved.items() if key not in _KEYS and value]
        names = {saved.get(key, "sentence_embedding") for key in ("module_input_name", "module_output_name")}
        activation = str(saved.get("activation_function", "torch.nn.modules.activation.Tanh"))
        settings = {
            "in_features": saved["in_features"],
            "out_features": saved["out_features"],
            "bias": saved.get("bias", True),
            "activation": activation.rpartition(".")[2],
        }
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{what} has a config.json that is not that of a dense layer ({error!r})") from error
    if unknown or names != {"sentence_embedding"}:
        problem = f"has {', '.join(unknown)}" if unknown else "is not for the embedding of the whole text"
        raise ValueError(f"{what} {problem}, which is not offered; {_WAY_OUT}")
    if settings["activation"] not in ACTIVATIONS or not activation.startswith("torch.nn."):
        raise ValueError(f"{what} has the activation {activation}; offered: {', '.join(ACTIVATIONS)}; {_WAY_OUT}")
    check_sentence_layers([settings])
    return settings


def _read_weights(name: str, folder: str, what: str) -> dict[str, torch.Tensor]:
    paths = (find_file(name, f"{folder}/{file}") for file in _WEIGHT_FILES)
    path = next((path for path in paths if path is not None), None)
    if path is None:
        raise ValueError(f"{what} has no weights ({' or '.join(_WEIGHT_FILES)}); the copy is incomplete")
    try:
        is_safe = path.endswith(".safetensors")
        tensors = load_file(path) if is_safe else torch.load(path, map_location="cpu", weights_only=True)
        return {key: value.float() for key, value in tensors.items()}
    except (OSError, RuntimeError, SafetensorError, pickle.UnpicklingError, AttributeError, EOFError) as error:
        raise ValueError(f"{what} has weights that cannot be read ({error!r})") from error
