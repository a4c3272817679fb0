"""The configuration of a MoLA adapter, which PEFT saves next to its weights."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal, get_args

from peft.config import PeftConfig
from peft.utils import PeftType
from safetensors import SafetensorError, safe_open

VARIANTS = ("router", "grad")
TRAIN_BASE = (False, True, "targets", "all")
PixelArchitecture = Literal["resnet8", "resnet20"]


class MolaPeftType(str, Enum):  # noqa: UP042
    """The name under which PEFT knows the method; `PeftType` itself cannot be extended from outside.

    It is not a `StrEnum`, because PEFT's status reports expect members to print like those of `PeftType`, with the
    name of the class.
    """

    MOLA = "MOLA"


MOLA_TYPE: Any = getattr(PeftType, "MOLA", MolaPeftType.MOLA)  # PEFT's own member, if a later release has one


@dataclass
class MolaConfig(PeftConfig):
    """Configuration of a [`MolaModel`], a mixture of low-rank adapters (ICML 2024, arXiv 2406.09679).

    A targeted layer computes `y = W x + (alpha / r) * sum_e gamma_e(x) B_e A_e x` over `num_experts` low-rank experts.
    The variant determines the weights `gamma`:

    - `"grad"`: 1 for the expert of the sample's task, which `task_ids` gives, and 0 for the others. Expert t learns
      from the samples of task t only.
    - `"router"`: the softmax of one router that all layers share. The task need not be known.

    Another method of the same name (arXiv 2402.08562) is not implemented here.

    Args:
        variant (`str`): The source of the experts' weights, `"router"` or `"grad"`.
        num_experts (`int`): The number of experts per layer; for `"grad"` the number of tasks.
        r (`int`): The rank of an expert.
        alpha (`float`): The numerator of the factor `alpha / r` of the adapter's contribution.
        use_rslora (`bool`): True for [rank-stabilised LoRA](https://huggingface.co/papers/2312.03732): the factor is
            `alpha / math.sqrt(r)`, which keeps the size of the contribution as the rank grows. False for `alpha / r`.
        dropout (`float`): The dropout probability of the adapter's input.
        rank_pattern (`dict`): Ranks that differ from `r`, by module name or regular expression.
        alpha_pattern (`dict`): Alphas that differ from `alpha`, by module name or regular expression.
        target_modules (`list[str]` or `str`, *optional*): The modules to adapt: names, a regular expression, or
            `"all-linear"`. By default they depend on the architecture (CLIP, SigLIP, ViT, ResNet, BERT and others).
        exclude_modules (`list[str]` or `str`, *optional*): The modules not to adapt.
        sequence_first (`list[str]` or `str`, *optional*): The targets whose input is `(L, B, D)`, names or a regular
            expression; `[]` if there are none. By default they are found for the layers of torch and of transformers,
            and an input that may be of either form is refused.
        layers_to_transform (`list[int]` or `int`, *optional*): The indices of the layers to adapt.
        layers_pattern (`list[str]` or `str`, *optional*): The name of the `nn.ModuleList` that these indices refer to.
        bias (`str`): The biases to train: `"none"`, `"all"` or `"mola_only"`.
        modules_to_save (`list[str]`, *optional*): Further modules to train and save as a whole.
        init_weights (`bool`): True to start `B` at zero, so that the adapter has no effect at first; False to start it
            at random.
        router_input (`str`, *optional*): The input of the router: `"pixels"` (a small ResNet on `pixel_values`),
            `"embeddings"` (the pooled output of the input layer), or a name registered with [`register_router`]. The
            default is pixels if the model takes `pixel_values`, otherwise embeddings. The text tower of a dual encoder
            is always routed by its own text, so that a caption can be encoded without its image.
        router_image_size (`int`, *optional*): The side in pixels to which images are reduced for the router; None to
            keep their size.
        router_architecture (`str`, *optional*): The network of a router on pixels: `"resnet8"` (0.07 M parameters) or
            the `"resnet20"` of the paper (0.27 M), which costs ten times as much. None for `"resnet8"`; for an
            adapter whose file does not name it, since all such have a `"resnet20"`.
        decorrelation_weight (`float`): The factor of the task-wise decorrelation loss; 0 switches it off.
        decorrelation_dim (`int`): The number of dimensions to which that loss projects the router's scores.
        decorrelation_temperature (`float`): The temperature of that loss.
        default_task (`int`, *optional*): The task of a `"grad"` adapter when no `task_ids` are given. None raises an
            error in training and takes the mean of the experts in evaluation.
        train_base (`bool` or `str`): The part of the base that is trained and saved as well: False for none of it,
            `"targets"` (or True) for the targeted layers, `"all"` for everything.
        task_norms (`bool`): True to give each expert its own affine and, for batch norm, statistics in the
            normalisation layers of the adapted towers, which `target_modules` need not name and `exclude_modules` may
            exclude. A sample is normalised by those of its task, or by the mixture that the router weights.
        train_logit_scale (`bool`): True to train and save the model's `logit_scale` (and `logit_bias`).

    Raises:
        ValueError: If a setting is not one of the allowed values.
        TypeError: If a setting has the wrong type.
    """

    variant: str = field(default="router", metadata={"help": "Source of the experts' weights: 'router' or 'grad'."})
    num_experts: int = field(default=4, metadata={"help": "Experts per layer; for 'grad' the number of tasks."})
    r: int = field(default=8, metadata={"help": "Rank of an expert."})
    alpha: float = field(default=16.0, metadata={"help": "Numerator of the adapter's factor alpha / r."})
    use_rslora: bool = field(
        default=False,
        metadata={"help": "Rank-stabilised LoRA: the factor is alpha / sqrt(r) instead of alpha / r."},
    )
    dropout: float = field(default=0.0, metadata={"help": "Dropout probability of the adapter's input."})
    rank_pattern: dict[str, int] = field(
        default_factory=dict,
        metadata={"help": "Ranks that differ from `r`, by module name or regular expression."},
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict,
        metadata={"help": "Alphas that differ from `alpha`, by module name or regular expression."},
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
    sequence_first: list[str] | str | None = field(
        default=None,
        metadata={"help": "Targets whose input is (L, B, D), names or a regular expression; None to find them."},
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers to adapt; None: all."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the nn.ModuleList that `layers_to_transform` refers to."}
    )
    bias: str = field(default="none", metadata={"help": "Biases to train: 'none', 'all' or 'mola_only'."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train and save as a whole."}
    )
    init_weights: bool = field(default=True, metadata={"help": "Start B at zero (True) or at random (False)."})
    router_input: str | None = field(
        default=None,
        metadata={
            "help": "Input of the router: 'pixels', 'embeddings' or a name registered with register_router; None for "
            "pixels if the model takes pixel_values, otherwise embeddings."
        },
    )
    router_image_size: int | None = field(
        default=32, metadata={"help": "Side in pixels to which images are reduced for the router; None to keep it."}
    )
    router_architecture: PixelArchitecture | None = field(
        default=None,
        metadata={"help": "Network of a router on pixels: 'resnet8' (also for None) or 'resnet20', as in the paper."},
    )
    decorrelation_weight: float = field(
        default=0.1, metadata={"help": "Factor of the task-wise decorrelation loss of the router; 0 switches it off."}
    )
    decorrelation_dim: int = field(
        default=32, metadata={"help": "Dimensions to which that loss projects the router's scores."}
    )
    decorrelation_temperature: float = field(default=1.0, metadata={"help": "Temperature of that loss."})
    default_task: int | None = field(
        default=None,
        metadata={
            "help": "Task of a 'grad' adapter without task_ids; None for an error in training and the mean of the "
            "experts in evaluation."
        },
    )
    train_base: bool | str = field(
        default=False,
        metadata={"help": "Base weights to train and save as well: False, 'targets' (or True), 'all'."},
    )
    task_norms: bool = field(
        default=False, metadata={"help": "Give each expert its own affine and statistics in normalisation layers."}
    )
    train_logit_scale: bool = field(default=False, metadata={"help": "Train and save logit_scale (and logit_bias)."})

    def __post_init__(self) -> None:
        if self.router_architecture is None:  # only a file gives the type, and those without the field are older
            self.router_architecture = "resnet8" if self.peft_type is None else "resnet20"
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
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfig:
        """Load a configuration as [`~peft.PeftConfig.from_pretrained`] does, after a check of the weights next to it.

        Args:
            pretrained_model_name_or_path (`str`): A local folder or the name of a repository.
            subfolder (`str`, *optional*): The folder of the adapter in it.
            **kwargs (`Any`): Further arguments of PEFT's method.

        Returns:
            `PeftConfig`: The saved configuration.

        Raises:
            ValueError: If a local folder holds a truncated weights file.
        """
        _check_weights_file(os.path.join(pretrained_model_name_or_path, subfolder or ""))
        return super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)

    def get_rank(self, module_name: str) -> int:
        """Return the rank of the experts of the named module."""
        return _by_pattern(self.rank_pattern, module_name, self.r)

    def get_alpha(self, module_name: str) -> float:
        """Return the alpha of the named module."""
        return _by_pattern(self.alpha_pattern, module_name, self.alpha)

    def _check_choices(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(f"variant={self.variant!r}: must be one of {', '.join(map(repr, VARIANTS))}.")
        if self.bias not in ("none", "all", "mola_only"):
            raise ValueError(f"bias={self.bias!r}: must be 'none', 'all' or 'mola_only'.")
        if not any(self.train_base is allowed or self.train_base == allowed != 1 for allowed in TRAIN_BASE):
            raise ValueError(f"train_base={self.train_base!r}: must be False, True, 'targets' or 'all'.")
        allowed = get_args(PixelArchitecture)
        if self.router_architecture not in allowed:
            names = " or ".join(map(repr, allowed))
            raise ValueError(f"router_architecture={self.router_architecture!r}: must be {names}.")
        for name in ("init_weights", "task_norms", "train_logit_scale", "use_rslora"):
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
            f"{path} ({os.path.getsize(path)} bytes) is truncated or not a safetensors file ({error}); copy or "
            "download the adapter again."
        ) from error
