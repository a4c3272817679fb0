"""Makes the packages of docs/bridges.md importable where torchvision was built for another PyTorch."""

import importlib.util
import sys

import torch

_LIBRARY: list[torch.library.Library] = []
_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def mend_torchvision() -> None:
    """Make torchvision importable where its build is not that of PyTorch, without the operators that it lacks then.

    The index has torchvision for CUDA alone; with a PyTorch for the CPU, its compiled operators cannot be loaded, and
    the functions on pictures, which the tests need, do not use them.
    """
    if importlib.util.find_spec("torchvision") is None or "torchvision" in sys.modules:
        return
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        _LIBRARY.append(torch.library.Library("torchvision", "DEF"))
        for operator in _OPERATORS:
            _LIBRARY[0].define(operator)
        import torchvision  # noqa: F401
