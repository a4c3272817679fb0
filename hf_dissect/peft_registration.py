"""Makes PEFT know MoLA as soon as both packages are imported, in either order, without importing PEFT for it.

PEFT takes seconds to import, which `hf-dissect --help` must not; nor may a user of `PeftModel.from_pretrained` have to
name `hf_dissect.mola`.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
from types import ModuleType


def register_mola_with_peft() -> None:
    """Register MoLA now if PEFT is imported already, otherwise as soon as it is. May be called again."""
    peft = sys.modules.get("peft")
    if peft is not None and not getattr(peft.__spec__, "_initializing", False):
        importlib.import_module("hf_dissect.mola")
    elif not any(_is_ours(finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PeftFinder())


def _is_ours(finder: object) -> bool:
    return type(finder).__name__ == "_PeftFinder"  # by name: a reload of this module makes another class


class _PeftFinder(importlib.abc.MetaPathFinder):
    """Finds the package `peft` where all others find it, and has MoLA registered once it is loaded."""

    def find_spec(self, name: str, path=None, target: ModuleType | None = None):
        if name != "peft":
            return None
        others = [finder for finder in sys.meta_path if not _is_ours(finder) and hasattr(finder, "find_spec")]
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


class _RegisteringLoader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader):
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        importlib.import_module("hf_dissect.mola")

    def __getattr__(self, name: str):
        return getattr(self._loader, name)
