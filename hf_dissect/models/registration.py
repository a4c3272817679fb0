"""Register MoLA with PEFT and our models with transformers once those packages are imported, in either order.

Users of `PeftModel.from_pretrained` and `AutoModel.from_pretrained` need `import hf_dissect` and no module of it.
"""

import importlib
from types import ModuleType
from typing import Any

from hf_dissect.models.after_import import act_after_import

MODEL_CONFIGS = {
    "distilled_student": ("hf_dissect.distillation.student", "StudentConfig"),
    "dual_encoder": ("hf_dissect.models.dual_encoder", "DualEncoderConfig"),
    "frame_sequence_encoder": ("hf_dissect.distillation.encoders", "FrameSequenceEncoderConfig"),
    "precomputed_features": ("hf_dissect.models.feature_encoder", "PrecomputedFeaturesConfig"),
    "sequence_encoder": ("hf_dissect.distillation.encoders", "SequenceEncoderConfig"),
    "twin_dual_encoder": ("hf_dissect.models.twin_encoder", "TwinDualEncoderConfig"),
}
"""Module and configuration class of each model type of ours; importing the module registers its models."""


def register_with_peft_and_transformers() -> None:
    """Register now with a package that is imported already, otherwise as soon as it is."""
    act_after_import("peft", _register_mola)
    act_after_import("transformers.models.auto.configuration_auto", _register_model_types)


def _register_mola(peft: ModuleType) -> None:
    importlib.import_module("hf_dissect.mola")


def _register_model_types(configuration_auto: Any) -> None:
    # Stand-ins, since this module is imported in the middle of the import of models that ours are made of.
    for model_type, (module, name) in MODEL_CONFIGS.items():
        if model_type not in configuration_auto.CONFIG_MAPPING:
            stand_in = _make_stand_in(configuration_auto.PreTrainedConfig, model_type, module, name)
            configuration_auto.AutoConfig.register(model_type, stand_in)


def _make_stand_in(base: type, model_type: str, module: str, name: str) -> type:
    """Return a configuration class that makes configurations of the real one, imported when the first is made.

    Importing the real class registers it, and its model, in place of the stand-in.
    """

    def find_class() -> Any:
        return getattr(importlib.import_module(module), name)

    def make(cls: type, *args: Any, **kwargs: Any) -> Any:
        return find_class()(*args, **kwargs)

    def make_from_dict(cls: type, *args: Any, **kwargs: Any) -> Any:
        return find_class().from_dict(*args, **kwargs)

    methods = {"__new__": make, "from_dict": classmethod(make_from_dict)}
    return type(name, (base,), {"__module__": module, "model_type": model_type, **methods})
