"""Let a torchvision that was built for another PyTorch be imported, without the operators that it then lacks.

transformers, timm and open_clip import torchvision where it is installed, and this fails if its compiled part
cannot be loaded, such as that for CUDA next to a PyTorch for the CPU. Its transforms need no operator. Imported
before them.
"""

import importlib.util
from pathlib import Path

import torch

_DECLARED: list[torch.library.Library] = []
"""Declarations end with the objects that made them."""


def declare_missing() -> bool:
    """Declare the operators if torchvision is installed and cannot load its own, and return whether that was so."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or _DECLARED:
        return bool(_DECLARED)
    for file in Path(spec.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(str(file))
            return False
        except OSError:
            continue
    _DECLARED.append(torch.library.Library("torchvision", "DEF"))
    for name in ("nms", "qnms"):
        _DECLARED[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return True


LACKS_OPERATORS = declare_missing()
