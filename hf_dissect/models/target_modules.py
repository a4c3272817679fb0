"""Default target modules of an adapter on a dual encoder of two towers."""

from typing import Any

from hf_dissect.mola.base_model import TARGET_MODULES


def set_target_modules(config: Any, model: Any, frozen_tower: str | None = None) -> None:
    """Set the target modules of an adapter, in place, if none are named and the model has two towers of any kind.

    Args:
        config: Configuration of the adapter.
        model: Dual encoder; one of another type has the defaults that PEFT knows.
        frozen_tower: Tower that gets no adapter, `"vision"` or `"text"`.

    Raises:
        ValueError: If there are no defaults for a tower.
    """
    is_open = getattr(config, "target_modules", "") is None and not getattr(config, "target_parameters", None)
    if is_open and model.config.model_type == "dual_encoder":
        config.target_modules = choose_target_modules(model, frozen_tower)


def choose_target_modules(model: Any, frozen_tower: str | None = None) -> list[str]:
    """Choose the layers of both towers that an adapter changes, by the types of the towers.

    Args:
        model: Dual encoder with `vision_model` and `text_model`.
        frozen_tower: Tower that gets no adapter, `"vision"` or `"text"`.

    Returns:
        Names of layers, those of attention and of the layers behind it.

    Raises:
        ValueError: If there are no defaults for a tower.
    """
    chosen: dict[str, None] = {}
    for side in ("vision", "text"):
        tower = getattr(model, f"{side}_model")
        if side == frozen_tower or not any(True for _ in tower.parameters()):
            continue
        kind = tower.config.model_type
        if kind not in TARGET_MODULES:
            layers = {name.rpartition(".")[2] for name, part in tower.named_modules() if hasattr(part, "weight")}
            raise ValueError(
                f"target_modules is missing, and there is no default for the {side} tower ({kind}); name the layers "
                f"to adapt, of both towers, or all-linear (layers of this tower: {', '.join(sorted(layers)[:12])})"
            )
        chosen |= dict.fromkeys(TARGET_MODULES[kind])
    return list(chosen)
