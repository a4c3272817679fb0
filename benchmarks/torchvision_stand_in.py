"""A stand-in for torchvision, so that timm can be imported where no build of torchvision fits the installed PyTorch.

timm imports torchvision for its transforms and for some layers, and needs neither to build a model or to run one. The
stand-in has every name and can do nothing. transformers shall find no torchvision, since its image processors would
use it, but shall find timm; `install` arranges both.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from transformers.utils import import_utils


class _AnyName(type):
    """Class of classes that have every attribute, itself such a class, so that `InterpolationMode.BILINEAR` exists."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = _AnyName(name, (), {})
        setattr(cls, name, value)
        return value


class _StandIn(ModuleType):
    """Module that has every name."""

    __path__: list[str] = []
    __version__ = "0.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = _AnyName(name, (), {})
        setattr(self, name, value)
        return value


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finder of `torchvision` and everything in it."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> Any:
        """Return the spec of a stand-in; None for other modules."""
        if name.partition(".")[0] != "torchvision":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> ModuleType:
        """Return the stand-in."""
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing."""


def install() -> None:
    """Make timm importable without torchvision, and known to transformers; a second call changes nothing."""
    if import_utils.is_timm_available():
        return
    if import_utils.is_torchvision_available():
        raise RuntimeError("torchvision is installed; timm needs no stand-in for it")
    sys.meta_path.insert(0, _Finder())
    import timm  # noqa: F401

    # The answer for torchvision stays "no", as it has been given; that for timm depends on it and is asked once more.
    answer = import_utils.is_torchvision_available
    import_utils.is_timm_available.cache_clear()
    import_utils.is_torchvision_available = lambda: True
    try:
        import_utils.is_timm_available()
    finally:
        import_utils.is_torchvision_available = answer
