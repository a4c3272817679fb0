"""What a MoLA adapter is made of: the settings that are saved beside its weights."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from peft.config import PeftConfig
from peft.utils import PeftType
from safetensors import SafetensorError, safe_open

VARIANTS = ("router", "grad")
TRAIN_BASE = (False, True, "targets", "all")


class MolaPeftType(str, Enum):  # noqa: UP042
    """The name under which PEFT knows the method; `PeftType` itself cannot be extended from outside.

    No `StrEnum`: PEFT's status reports expect that a member prints as that of `PeftType` does, with the class's name.
    """

    MOLA = "MOLA"


MOLA_TYPE = getattr(PeftType, "MOLA", MolaPeftType.MOLA)  # PEFT's own member, should it get one


@dataclass
class MolaConfig(PeftConfig):
    """Configuration of a [`MolaModel`], a mixture of low-rank adapters (ICML 2024, arXiv 2406.09679).

    A targeted layer computes `y = W x + (alpha / r) * sum_e gamma_e(x) B_e A_e x` over `num_experts` low-rank experts.
    How the weights `gamma` come about is the variant:

    - `"grad"`: the expert of the sample's task, told by `task_ids`; expert t learns from task t only.
    - `"router"`: the softmax of one router that all layers share; the task need not be known.

    (arXiv 2402.08562 is another method of the same name.)

    Args:
        variant (`str`): `"router"` or `"grad"`.
        num_experts (`int`): The number of experts of a layer; for `"grad"` the number of tasks.
        r (`int`): The rank of an expert.
        alpha (`float`): The adapter's contribution is scaled by `alpha / r`.
        dropout (`float`): The dropout probability of the adapter's input.
        rank_pattern (`dict`): Module names or regular expressions, each with a rank that differs from `r`.
        alpha_pattern (`dict`): Module names or regular expressions, each with an alpha that differs from `alpha`.
        target_modules (`list[str]` or `str`, *optional*): The modules to adapt: names, a regular expression, or
            `"all-linear"`. By default chosen by the architecture (CLIP, SigLIP, ViT, ResNet, BERT and others).
        exclude_modules (`list[str]` or `str`, *optional*): The modules not to adapt.
        layers_to_transform (`list[int]` or `int`, *optional*): The indices of the layers to adapt.
        layers_pattern (`list[str]` or `str`, *optional*): The name of the `nn.ModuleList` these indices refer to.
        bias (`str`): Which biases train: `"none"`, `"all"` or `"mola_only"`.
        modules_to_save (`list[str]`, *optional*): Further modules that are trained and saved as a whole.
        init_weights (`bool`): True: `B` starts at zero, so that the adapter starts without effect. False: at random.
        router_input (`str`, *optional*): What the router looks at: `"pixels"` (a small ResNet on `pixel_values`),
            `"embeddings"` (the pooled output of the input layer), or a name given to [`register_router`]. By default
            pixels if the model takes `pixel_values`, otherwise embeddings. In a dual encoder the text tower is always
            routed by its own text, so that a caption can be encoded without its image.
        router_image_size (`int`, *optional*): The side in pixels to which images are reduced for the router; None: as
            they come.
        decorrelation_weight (`float`): The factor of the task-wise decorrelation loss; 0: there is none.
        decorrelation_dim (`int`): The number of dimensions the router's scores are mapped to for that loss.
        decorrelation_temperature (`float`): The temperature of that loss.
        default_task (`int`, *optional*): For `"grad"`: the task when no `task_ids` are given. None: an error in
            training, the mean of the experts in evaluation.
        train_base (`bool` or `str`): The base is trained and saved as well: False: none of it, `"targets"` (or True):
            the targeted layers, `"all"`: everything.
        train_logit_scale (`bool`): Train and save the model's `logit_scale` (and `logit_bias`).

    Raises:
        ValueError: a setting is not one of the allowed values.
        TypeError: a setting has the wrong type.
    """

    variant: str = field(default="router", metadata={"help": "How experts are weighted: 'router' or 'grad'."})
    num_experts: int = field(default=4, metadata={"help": "Experts a layer; for 'grad' the number of tasks."})
    r: int = field(default=8, metadata={"help": "Rank of an expert."})
    alpha: float = field(default=16.0, metadata={"help": "The adapter's contribution is scaled by alpha / r."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout probability of the adapter's input."})
    rank_pattern: dict[str, int] = field(
        default_factory=dict,
        metadata={"help": "Module names or regular expressions, each with a rank that differs from `r`."},
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict,
        metadata={"help": "Module names or regular expressions, each with an alpha that differs from `alpha`."},
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names of the modules to adapt, a regular expression, or 'all-linear'.",
            "example": "['q_proj', 'v_proj'] or '.*vision_model.*(q_proj|v_proj)'",
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names of the modules not to adapt, or a regular expression."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers to adapt; None: all."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the nn.ModuleList that `layers_to_transform` refers to."}
    )
    bias: str = field(default="none", metadata={"help": "Which biases train: 'none', 'all' or 'mola_only'."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules that are trained and saved as a whole."}
    )
    init_weights: bool = field(default=True, metadata={"help": "Whether B starts at zero (else at random)."})
    router_input: str | None = field(
        default=None,
        metadata={
            "help": "What the router looks at: 'pixels', 'embeddings' or a name given to register_router; None: "
            "pixels if the model takes pixel_values, otherwise embeddings."
        },
    )
    router_image_size: int | None = field(
        default=32, metadata={"help": "Side to which images are reduced for the router; None: as they come."}
    )
    decorrelation_weight: float = field(
        default=0.1, metadata={"help": "Factor of the task-wise decorrelation loss of the router; 0: there is none."}
    )
    decorrelation_dim: int = field(
        default=32, metadata={"help": "Dimensions the router's scores are mapped to for that loss."}
    )
    decorrelation_temperature: float = field(default=1.0, metadata={"help": "Temperature of that loss."})
    default_task: int | None = field(
        default=None,
        metadata={
            "help": "Task when no task_ids are given; None: an error in training, the mean of the experts in "
            "evaluation."
        },
    )
    train_base: bool | str = field(
        default=False,
        metadata={"help": "Base weights trained and saved as well: False, 'targets' (or True), 'all'."},
    )
    train_logit_scale: bool = field(
        default=False, metadata={"help": "Whether logit_scale (and logit_bias) are trained and saved."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = MOLA_TYPE
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), list):
                setattr(self, name, set(value))
        self._check_choices()
        self._check_numbers()
        self._check_layers()
        if self.train_base is True:
            self.train_base = "targets"

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any):
        """As for every PEFT configuration; adapter weights beside a local one are first seen to be a whole file."""
        _check_weights_file(os.path.join(pretrained_model_name_or_path, subfolder or ""))
        return super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)

    def rank_of(self, module_name: str) -> int:
        """The rank of the experts of one module."""
        return _by_pattern(self.rank_pattern, module_name, self.r)

    def alpha_of(self, module_name: str) -> float:
        """The alpha of one module."""
        return _by_pattern(self.alpha_pattern, module_name, self.alpha)

    def _check_choices(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(f"variant={self.variant!r}: must be one of {', '.join(map(repr, VARIANTS))}.")
        if self.bias not in ("none", "all", "mola_only"):
            raise ValueError(f"bias={self.bias!r}: must be 'none', 'all' or 'mola_only'.")
        if not any(self.train_base is allowed or self.train_base == allowed != 1 for allowed in TRAIN_BASE):
            raise ValueError(f"train_base={self.train_base!r}: must be False, True, 'targets' or 'all'.")
        for name in ("init_weights", "train_logit_scale"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r}: must be True or False.")
        if self.router_input is not None and not isinstance(self.router_input, str):
            raise TypeError(
                f"router_input is a {type(self.router_input).__name__}; it must be 'pixels', 'embeddings' or the name "
                "under which a router was registered with hf_dissect.mola.register_router."
            )

    def _check_numbers(self) -> None:
        for name in ("num_experts", "r", "decorrelation_dim"):
            _check_positive_integer(name, getattr(self, name))
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(getattr(self, name), dict):
                raise TypeError(
                    f"{name} is a {type(getattr(self, name)).__name__}; it must be a dict of module names or regular "
                    "expressions."
                )
        for module, rank in self.rank_pattern.items():
            _check_positive_integer(f"rank_pattern[{module!r}]", rank)
        for module, alpha in {"": self.alpha, **self.alpha_pattern}.items():
            name = f"alpha_pattern[{module!r}]" if module else "alpha"
            _check_number(name, alpha, "above 0", lambda value: value > 0)
        _check_number("dropout", self.dropout, "in [0, 1)", lambda value: 0 <= value < 1)
        _check_number("decorrelation_weight", self.decorrelation_weight, "0 or more", lambda value: value >= 0)
        _check_number("decorrelation_temperature", self.decorrelation_temperature, "above 0", lambda value: value > 0)
        if self.router_image_size is not None:
            _check_positive_integer("router_image_size", self.router_image_size)
        task = self.default_task
        if task is not None and (type(task) is not int or task not in range(self.num_experts)):
            raise ValueError(
                f"default_task={task!r}: must be a task from 0 to num_experts - 1 = {self.num_experts - 1}, or None."
            )

    def _check_layers(self) -> None:
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(f"`{name}` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")


def _check_positive_integer(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r}: must be an integer of 1 or more.")


def _check_number(name: str, value: Any, allowed: str, accepts: Callable[[float], bool]) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not accepts(value):
        raise ValueError(f"{name}={value!r}: must be {allowed}.")


def _by_pattern(patterns: dict[str, Any], module_name: str, default: Any) -> Any:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module_name):
            return value
    return default


def _check_weights_file(folder: str) -> None:
    path = os.path.join(folder, "adapter_model.safetensors")
    if not os.path.isfile(path):
        return
    try:
        with safe_open(path, framework="pt") as weights:
            weights.keys()
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} ({os.path.getsize(path)} bytes) is truncated or no safetensors file ({error}); copy or download "
            "the adapter again."
        ) from error
