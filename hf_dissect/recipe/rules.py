"""Checks what the settings of a recipe must agree on, such as a batch and a ratio that leave two pairs to train on."""

import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from hf_dissect.recipe.fields import problem_with, show, training_fields
from hf_dissect.recipe.schema import STRATEGIES, parse_strategy

if TYPE_CHECKING:
    from hf_dissect.recipe.recipe import Recipe

# The keys that are involved, the one to blame first, and what is wrong.
Fault = tuple[tuple[str, ...], str]

# What `selection.options` may hold for each strategy that takes any, as arguments of `problem_with`.
_OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "dissect": {
        "variant": {"expected": str, "choices": STRATEGIES["dissect"]},
        "momentum": {"expected": float, "within": "[0, 1)"},
        "warmup_on": {"expected": str, "choices": ("subset", "all")},
    },
    "gsc": {
        "beta": {"expected": float, "within": "(0, 1]"},
        "temperature": {"expected": float, "within": "(0, inf)"},
        "seed": {"expected": int, "within": "[0, 4294967295]"},
    },
    "ncr": {"seed": {"expected": int, "within": "[0, 4294967295]"}},
}


def find_conflicts(recipe: "Recipe") -> Iterator[Fault]:
    """Every fault that a setting has only together with others."""
    yield from _run(recipe)
    yield from _model(recipe)
    yield from _adapter(recipe)
    yield from _data(recipe)
    yield from _noise(recipe)
    yield from _selection(recipe)
    yield from _options(recipe)
    yield from _gsc(recipe)
    yield from _twins(recipe)
    yield from _evaluation(recipe)
    yield from _zero_shot(recipe)
    yield from _training(recipe)
    yield from _compare(recipe)


def _run(recipe: "Recipe") -> Iterator[Fault]:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", recipe.name):
        problem = f"{show(recipe.name)} is not allowed" if recipe.name else "missing"
        yield ("name",), f"{problem}; allowed: letters, digits, '.', '_' and '-' (the run's folder is named so)"
    if len(recipe.description.splitlines()) > 1:
        yield ("description",), f"{show(recipe.description)} is not allowed; allowed: one line"


def _model(recipe: "Recipe") -> Iterator[Fault]:
    model, keys = recipe.model, ("model.name_or_path", "model.config")
    if model.name_or_path and model.config is not None:
        yield keys, f"{show(model.name_or_path)} and model.config are both set; set the one that is not meant to null"
    elif not model.name_or_path and model.config is None:
        yield keys, "missing; set name_or_path (a trained model) or config (a model from scratch)"
    elif model.config is not None and not isinstance(model.config.get("model_type"), str):
        yield (
            ("model.config.model_type",),
            f"{show(model.config.get('model_type'))} is not allowed; allowed: an architecture, such as clip",
        )


def _adapter(recipe: "Recipe") -> Iterator[Fault]:
    adapter = recipe.adapter or {}
    routed_by_task = adapter.get("type") == "mola" and adapter.get("variant") == "grad"
    if routed_by_task and adapter.get("default_task") is None and recipe.data.task_column is None:
        yield (
            ("data.task_column", "adapter"),
            "missing; adapter.variant grad trains an expert for each task and needs the column that tells it",
        )


def _data(recipe: "Recipe") -> Iterator[Fault]:
    data = recipe.data
    if data.source == "scenes" and data.path:
        yield (
            ("data.path", "data.source"),
            f"{show(data.path)} would not be read: data.source is scenes; "
            "set data.source to hub, folder, imagefolder or webdataset, or data.path to null",
        )
    if data.source != "scenes" and not data.path:
        yield ("data.path", "data.source"), f"missing; data.source {data.source} needs one (data.path=...)"
    if data.name and data.source != "hub":
        yield ("data.name", "data.source"), f"{show(data.name)} is only for data.source hub, not {data.source}"
    if data.streaming and _training_value(recipe, "max_steps") <= 0:
        yield (
            ("data.streaming", "training.max_steps"),
            "true needs training.max_steps: the length of a stream is unknown, hence that of an epoch",
        )
    if data.source == "webdataset" and "://" in (data.path or "") and not data.streaming:
        yield (
            ("data.streaming", "data.path"),
            f"false, but the shards of {show(data.path)} lie elsewhere; set it to true, or copy them here first",
        )
    if data.streaming and data.image_features:
        yield (
            ("data.image_features", "data.streaming"),
            f"{show(data.image_features)} needs rows in a fixed order; set data.streaming to false",
        )


def _noise(recipe: "Recipe") -> Iterator[Fault]:
    data = recipe.data
    if data.noise_rate and data.noise_permutation:
        yield (
            ("data.noise_permutation", "data.noise_rate"),
            f"{show(data.noise_permutation)} and data.noise_rate {data.noise_rate} are both set; "
            "set data.noise_rate to 0 or data.noise_permutation to null",
        )
    if data.streaming and (data.noise_rate or data.noise_permutation):
        key = "data.noise_rate" if data.noise_rate else "data.noise_permutation"
        value = data.noise_rate or data.noise_permutation
        yield (
            (key, "data.streaming"),
            f"{show(value)} needs all captions at once; set data.streaming to false, or leave the captions alone",
        )


def _selection(recipe: "Recipe") -> Iterator[Fault]:
    selection, batch = recipe.selection, _training_value(recipe, "per_device_train_batch_size")
    kept = round(selection.ratio * batch)
    if selection.strategy != "none" and selection.ratio * batch < 2 - 1e-9:
        yield (
            ("selection.ratio", "training.per_device_train_batch_size", "selection.strategy"),
            f"{selection.ratio} of training.per_device_train_batch_size {batch} keeps "
            f"k = round(ratio * batch) = {kept} pairs, and a contrastive loss needs 2; "
            f"allowed: a batch of at least {math.ceil(2 / selection.ratio)}, or a ratio of at least {2 / batch:.3g}",
        )
    epochs, steps = _training_value(recipe, "num_train_epochs"), _training_value(recipe, "max_steps")
    is_dissect = selection.strategy == "dissect"
    warms_up = is_dissect and selection.options.get("variant", "warmup") == "warmup" or selection.strategy == "ncr"
    if warms_up and selection.warmup_epochs == 0 and not (is_dissect and selection.ledger):
        way_out = ", or selection.options.variant: momentum, or selection.ledger" if is_dissect else ""
        yield (
            ("selection.warmup_epochs", "selection.strategy", "selection.options", "selection.ledger"),
            f"0 leaves no history to select by; allowed: at least 1{way_out}",
        )
    if warms_up and steps <= 0 and selection.warmup_epochs >= epochs:
        yield (
            ("selection.warmup_epochs", "training.num_train_epochs", "training.max_steps", "selection.options"),
            f"{selection.warmup_epochs} leaves no epoch to select in; "
            f"allowed: less than training.num_train_epochs ({epochs:g})",
        )


def _options(recipe: "Recipe") -> Iterator[Fault]:
    strategy, options = recipe.selection.strategy, recipe.selection.options
    allowed = _OPTIONS.get(strategy, {})
    for name, value in options.items():
        key = f"selection.options.{name}"
        if not allowed:
            yield (
                (key, "selection.strategy"),
                f"{show(value)} is not allowed: {strategy} takes no options; set selection.options to {{}}",
            )
        elif name not in allowed:
            yield (
                (key, "selection.strategy"),
                f"unknown key (value {show(value)}); allowed for {strategy}: {', '.join(allowed)}",
            )
        elif problem := problem_with(value, **allowed[name]):
            yield (key,), problem


def _twins(recipe: "Recipe") -> Iterator[Fault]:
    gsc, model = recipe.objective.gsc, recipe.model
    if gsc is None or not gsc.dual:
        if model.second_name_or_path:
            yield (
                ("model.second_name_or_path", "objective.gsc"),
                f"{show(model.second_name_or_path)} would not be read: objective.gsc.dual is not true; set that, or "
                "model.second_name_or_path to null",
            )
    elif recipe.adapter is not None:
        yield (
            ("objective.gsc.dual", "adapter"),
            "true trains two whole networks; set it to false, or adapter to null",
        )
    elif model.second_name_or_path and model.config is not None:
        yield (
            ("model.second_name_or_path", "model.config"),
            f"{show(model.second_name_or_path)} would not fit a model from scratch; set it to null, and the second "
            "network is one more of random weights",
        )


def _gsc(recipe: "Recipe") -> Iterator[Fault]:
    gsc, epochs = recipe.objective.gsc, _training_value(recipe, "num_train_epochs")
    if gsc is None:
        return
    if recipe.selection.mask_false_negatives:
        yield (
            ("objective.gsc", "selection.mask_false_negatives"),
            "does not go with selection.mask_false_negatives, as it counts every other pair of the batch; "
            "set one of them to null or false",
        )
    if _training_value(recipe, "max_steps") <= 0 and gsc.warmup_epochs >= epochs:
        yield (
            ("objective.gsc.warmup_epochs", "training.num_train_epochs", "training.max_steps"),
            f"{gsc.warmup_epochs} leaves no epoch with soft labels; "
            f"allowed: less than training.num_train_epochs ({epochs:g})",
        )


def _evaluation(recipe: "Recipe") -> Iterator[Fault]:
    data, evaluation, training = recipe.data, recipe.evaluation, recipe.training
    if evaluation.batch_size is not None and "per_device_eval_batch_size" in training:
        yield (
            ("evaluation.batch_size", "training.per_device_eval_batch_size"),
            f"{evaluation.batch_size} and training.per_device_eval_batch_size are both set; keep one",
        )
    if evaluation.retrieval and not data.validation_split and not data.test_split:
        yield (
            ("evaluation.retrieval", "data.validation_split", "data.test_split"),
            "true needs data.validation_split or data.test_split; set it to false",
        )
    if training.get("eval_strategy", "no") != "no" and not data.validation_split:
        yield (
            ("training.eval_strategy", "data.validation_split"),
            f"{show(training['eval_strategy'])} needs data.validation_split; set it to 'no'",
        )


def _zero_shot(recipe: "Recipe") -> Iterator[Fault]:
    zero_shot, where = recipe.evaluation.zero_shot, "evaluation.zero_shot"
    if zero_shot is None:
        return
    if not zero_shot.classes or not all(name.strip() for name in zero_shot.classes):
        yield (f"{where}.classes",), f"{show(zero_shot.classes)} is not allowed; allowed: at least one class name"
    elif len(set(zero_shot.classes)) < len(zero_shot.classes):
        yield (f"{where}.classes",), f"{show(zero_shot.classes)} is not allowed; allowed: each class name once"
    if not zero_shot.templates:
        yield (f"{where}.templates",), "[] is not allowed; allowed: at least one, such as 'a photo of a {}.'"
    for template in zero_shot.templates:
        if not _is_template(template):
            yield (
                (f"{where}.templates",),
                f"{show(template)} is not allowed; allowed: text with {{}} for the class name",
            )
    if bool(zero_shot.source) != bool(zero_shot.path):
        given, missing = ("source", "path") if zero_shot.source else ("path", "source")
        yield (
            (f"{where}.{missing}", f"{where}.{given}"),
            f"missing; {where}.{given} is {show(getattr(zero_shot, given))} and needs it",
        )
    if not zero_shot.source and not zero_shot.path and recipe.data.source != "scenes":
        yield (
            (f"{where}.path", f"{where}.source", "data.source"),
            f"missing; only data.source scenes brings labelled images of its own, not {recipe.data.source}",
        )


def _is_template(template: str) -> bool:
    try:
        return "{}" in template and "class name" in template.format("class name")
    except (KeyError, IndexError, ValueError):
        return False


def _training(recipe: "Recipe") -> Iterator[Fault]:
    training = recipe.training
    if training.get("bf16") and training.get("fp16"):
        yield ("training.fp16", "training.bf16"), "true is not allowed together with training.bf16; set one to false"
    if training.get("max_steps") == 0:
        yield ("training.max_steps",), "0 is not allowed; allowed: at least 1, or -1 for training.num_train_epochs"


def _compare(recipe: "Recipe") -> Iterator[Fault]:
    compare, seen = recipe.compare, []
    if not compare.strategies:
        yield ("compare.strategies",), f"[] is not allowed; allowed: at least one of {', '.join(STRATEGIES)}"
    for spec in compare.strategies:
        try:
            seen.append(parse_strategy(spec))
        except ValueError as error:
            yield ("compare.strategies",), str(error)
        else:
            if seen.count(seen[-1]) == 2:
                yield ("compare.strategies",), f"{spec!r} is there twice; allowed: each strategy once"
    if not compare.seeds or len(set(compare.seeds)) < len(compare.seeds):
        yield ("compare.seeds",), f"{show(compare.seeds)} is not allowed; allowed: at least one, each seed once"


def _training_value(recipe: "Recipe", name: str) -> Any:
    return recipe.training.get(name, training_fields()[name][1])
