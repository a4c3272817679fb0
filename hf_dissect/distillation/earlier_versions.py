"""Settings of runs of earlier versions, whose recipes mean other defaults."""

from typing import Any

from hf_dissect.distillation.terms import TASK_TERMS, TERMS

_NONE = {name: 0.0 for name in TERMS if name not in TASK_TERMS}
TERM_WEIGHTS = {
    "hinton": _NONE | {"hinton": 0.3},
    "crd": _NONE | {"contrastive": 0.3},
    "mi_student_only": _NONE | {"information_student": 0.3},
    "amid": _NONE | {"information_student": 0.3, "information_auxiliary": 0.3, "conditional_entropy": 0.2},
}
"""Weights of the terms in version 0.1.0, by method, besides those of the tasks."""
YOUNGER = {"compared_teacher": "all", "standardise_compared": False}
"""Values by which version 0.1.0 trained, of settings that it did not have."""
_DATA = ("num_workers", "max_train_rows", "max_eval_rows", "test_split", "validation_split", "max_bad_fraction")


def restore_earlier_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Add the settings by which an earlier version trained to the recipe that it saved in a run folder.

    A saved recipe lists all settings of its data. One that does so and lacks the younger settings was saved by an
    earlier version. Any other recipe is returned unchanged.

    Args:
        settings: Content of a recipe, not checked yet.
    """
    data, distillation = settings.get("data"), settings.get("distillation")
    if not isinstance(data, dict) or not isinstance(distillation, dict):
        return settings
    if not set(_DATA) <= set(data) or set(YOUNGER) & set(distillation):
        return settings
    given = distillation.get("term_weights")
    if given is not None and not isinstance(given, dict):
        return settings
    weights = TERM_WEIGHTS.get(str(distillation.get("method", "amid")), {})
    return settings | {"distillation": {**YOUNGER, **distillation, "term_weights": {**weights, **(given or {})}}}
