"""Checks of a recipe's model against the settings it must agree with."""

from collections.abc import Iterator

from hf_dissect.recipe.rules import Fault, model_source_conflicts
from hf_dissect.recipe.schema import DataSection, EvaluationSection, ModelSection, TextTowerSection, VisionTowerSection
from hf_dissect.settings import show


def model_conflicts(model: ModelSection, data: DataSection, evaluation: EvaluationSection) -> Iterator[Fault]:
    """Yield the faults of the model's source, and of its two towers and the stored features that they read."""
    if model.vision is None and model.text is None:
        yield from model_source_conflicts("model", model.name_or_path, model.config, "model", "clip")
        if model.projection_dim is not None:
            yield (
                ("model.projection_dim", "model.vision", "model.text"),
                f"{model.projection_dim} is only for a model of vision and text; set it to null, or "
                "model.config.projection_dim for a model from scratch",
            )
        return
    for name in ("name_or_path", "config", "second_name_or_path"):
        if (value := getattr(model, name)) is not None:
            yield (
                (f"model.{name}", "model.vision", "model.text"),
                f"{show(value)} does not go with two towers (model.vision, model.text); set it to null, or the towers",
            )
    if model.trust_remote_code:
        yield (
            ("model.trust_remote_code", "model.vision", "model.text"),
            "true does not go with two towers, which are rebuilt by the classes of transformers; set it to false",
        )
    for side, tower, other in (("vision", model.vision, model.text), ("text", model.text, model.vision)):
        yield from _tower_conflicts(side, tower, other)
    if model.text is not None:
        yield from _text_feature_conflicts(model.text, data, evaluation)


def _tower_conflicts(
    side: str, tower: VisionTowerSection | TextTowerSection | None, other: VisionTowerSection | TextTowerSection | None
) -> Iterator[Fault]:
    where = f"model.{side}"
    if tower is None:
        if other is not None:
            yield (where,), "missing; a dual encoder needs model.vision and model.text"
        return
    names = [name for name in ("name_or_path", "timm", "features") if hasattr(tower, name)]
    given = [name for name in names if getattr(tower, name)]
    if not given:
        yield (where, *(f"{where}.{name}" for name in names)), f"missing; set one of {', '.join(names)}"
    if len(given) > 1:
        both = " and ".join(f"{where}.{name}" for name in given)
        yield (f"{where}.{given[1]}", f"{where}.{given[0]}"), f"{both} are both set; keep one"


def _text_feature_conflicts(
    text: TextTowerSection, data: DataSection, evaluation: EvaluationSection
) -> Iterator[Fault]:
    if not text.features:
        if data.text_features:
            yield (
                ("data.text_features", "model.text.features"),
                f"{show(data.text_features)} would not be read; set model.text.features to true in place of "
                "model.text.name_or_path, or data.text_features to null",
            )
        return
    if text.pooling is not None:
        yield (
            ("model.text.pooling", "model.text.features"),
            f"{show(text.pooling)} does not go with stored features, which are pooled; set it to null",
        )
    if evaluation.zero_shot is not None:
        yield (
            ("evaluation.zero_shot", "model.text.features"),
            "needs a text tower that encodes the class names; set it to null, or model.text.name_or_path",
        )
