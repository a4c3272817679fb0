"""Checks that both kinds of recipes share, of settings that must agree with each other."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from hf_dissect.settings import show

# The keys that are involved, the one to blame first, and what is wrong.
Fault = tuple[tuple[str, ...], str]


def run_conflicts(name: str, description: str, training: Mapping[str, Any]) -> Iterator[Fault]:
    """Yield the faults of name, description and the section `training`."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        problem = f"{show(name)} is not allowed" if name else "missing"
        yield ("name",), f"{problem}; allowed: letters, digits, '.', '_' and '-' (the run's folder is named so)"
    if len(description.splitlines()) > 1:
        yield ("description",), f"{show(description)} is not allowed; allowed: one line"
    if training.get("bf16") and training.get("fp16"):
        yield ("training.fp16", "training.bf16"), "true is not allowed together with training.bf16; set one to false"
    yield from _best_model_conflicts(training)
    if training.get("average_weights") is not None and training.get("load_best_model_at_end"):
        yield (
            ("training.average_weights", "training.load_best_model_at_end"),
            f"{training['average_weights']} makes a mean the final model, and training.load_best_model_at_end the "
            "best checkpoint; set training.average_weights to null or training.load_best_model_at_end to false",
        )
    if training.get("max_steps") == 0:
        yield ("training.max_steps",), "0 is not allowed; allowed: at least 1, or -1 for training.num_train_epochs"


def _best_model_conflicts(training: Mapping[str, Any]) -> Iterator[Fault]:
    evaluates, saves = (
        training.get(f"{name}_strategy", default) for name, default in (("eval", "no"), ("save", "steps"))
    )
    keys = ("training.load_best_model_at_end", "training.eval_strategy", "training.save_strategy")
    if training.get("load_best_model_at_end"):
        if evaluates == "no":
            yield keys, "true needs evaluations to choose by; set training.eval_strategy to 'epoch' or 'steps'"
        elif saves not in (evaluates, "best"):
            yield (
                keys,
                f"true needs a checkpoint for each evaluation; set training.save_strategy ({show(saves)}) to "
                f"{show(evaluates)}, as training.eval_strategy, or to 'best'",
            )
    if saves == "best" and evaluates == "no":
        yield keys[:0:-1], "'best' needs evaluations to choose by; set training.eval_strategy to 'epoch' or 'steps'"
    if saves == "best" and not training.get("metric_for_best_model"):
        yield (
            ("training.metric_for_best_model", "training.save_strategy"),
            "missing; training.save_strategy 'best' needs one, such as recall_sum or loss",
        )


def model_source_conflicts(
    where: str, name_or_path: str | None, config: Mapping[str, Any] | None, noun: str, example: str
) -> Iterator[Fault]:
    """Yield the faults of a section that names a trained model or the configuration of a new one.

    Args:
        where: Dotted key of the section.
        name_or_path: Its setting of that name.
        config: Its setting of that name.
        noun: Word for the model.
        example: Architecture that an error message names.
    """
    keys = (f"{where}.name_or_path", f"{where}.config")
    if name_or_path and config is not None:
        yield keys, f"{show(name_or_path)} and {where}.config are both set; set the one that is not meant to null"
    elif not name_or_path and config is None:
        yield keys, f"missing; set name_or_path (a trained {noun}) or config (one from scratch)"
    elif config is not None and not isinstance(config.get("model_type"), str):
        problem = f"{show(config.get('model_type'))} is not allowed"
        yield (f"{where}.config.model_type",), f"{problem}; allowed: an architecture, such as {example}"
