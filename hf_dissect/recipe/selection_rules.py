"""Checks of a recipe's selection, objective and comparison against the settings they must agree with."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

from hf_dissect.recipe.compare_schema import CompareSection, parse_strategy
from hf_dissect.recipe.fields import training_value
from hf_dissect.recipe.objective_schema import (
    GscSection,
    ObjectiveSection,
    find_clash,
    find_repair_fault,
    list_robust_objectives,
)
from hf_dissect.recipe.rules import Fault
from hf_dissect.recipe.schema import (
    STRATEGIES,
    DataSection,
    ModelSection,
    SelectionSection,
)
from hf_dissect.selection.options import OPTIONS, WITH_REFERENCE, find_unused_option
from hf_dissect.settings import find_problems, list_settings, show


def selection_conflicts(selection: SelectionSection, training: Mapping[str, Any]) -> Iterator[Fault]:
    """Yield the faults of ratio, batch and warm-up."""
    batch = training_value(training, "per_device_train_batch_size")
    kept = round(selection.ratio * batch)
    if selection.strategy != "none" and selection.ratio * batch < 2 - 1e-9:
        yield (
            ("selection.ratio", "training.per_device_train_batch_size", "selection.strategy"),
            f"{selection.ratio} of training.per_device_train_batch_size {batch} keeps "
            f"k = round(ratio * batch) = {kept} pairs, and a contrastive loss needs 2; "
            f"allowed: a batch of at least {math.ceil(2 / selection.ratio)}, or a ratio of at least {2 / batch:.3g}",
        )
    if selection.rescore_every > 1 and selection.scope == "global":
        yield (
            ("selection.rescore_every", "selection.scope"),
            f"{selection.rescore_every} does not go with selection.scope global, since each process plans its own "
            "candidates before they are loaded; set it to 1, or selection.scope to local",
        )
    epochs, steps = training_value(training, "num_train_epochs"), training_value(training, "max_steps")
    is_dissect = selection.strategy == "dissect"
    remembers_scores = selection.options.get("history", "ledger") == "ledger"
    is_warmup = selection.options.get("variant", "warmup") == "warmup" and remembers_scores
    warms_up = is_dissect and is_warmup or selection.strategy == "ncr"
    if warms_up and selection.warmup_epochs == 0 and not (is_dissect and selection.ledger):
        way_out = ", or selection.options.variant: momentum, or selection.ledger" if is_dissect else ""
        yield (
            ("selection.warmup_epochs", "selection.strategy", "selection.options", "selection.ledger"),
            f"0 leaves no history to select by; allowed: at least 1{way_out}",
        )
    # An epoch of scan marks the pairs that later ones prune.
    needed = selection.warmup_epochs + 1 if selection.strategy == "scan" else selection.warmup_epochs
    if (warms_up or selection.strategy == "scan") and steps <= 0 and needed >= epochs:
        yield (
            ("selection.warmup_epochs", "training.num_train_epochs", "training.max_steps", "selection.options"),
            f"{selection.warmup_epochs} leaves no epoch to select in; "
            f"allowed: less than training.num_train_epochs ({epochs:g})"
            + (
                ", by more than 1 for scan, which marks the pairs for an epoch"
                if needed > selection.warmup_epochs
                else ""
            ),
        )


def option_conflicts(selection: SelectionSection) -> Iterator[Fault]:
    """Yield the faults of the strategy's options."""
    strategy, options = selection.strategy, OPTIONS[selection.strategy]
    known = list_settings(options)
    for name, value in selection.options.items():
        keys = (f"selection.options.{name}", "selection.strategy")
        if not known:
            problem = f"is not allowed: {strategy} takes no options; set selection.options to {{}}"
            yield keys, f"{show(value)} {problem}"
        elif name not in known:
            yield keys, f"unknown key (value {show(value)}); allowed for {strategy}: {', '.join(known)}"
    for name, problem in find_problems(options, selection.options):
        yield (f"selection.options.{name}",), problem
    if strategy == "dissect" and (unused := find_unused_option(selection.options)):
        yield (f"selection.options.{unused[0]}", "selection.options"), unused[1]


def reference_conflicts(selection: SelectionSection, compare: CompareSection, data: DataSection) -> Iterator[Fault]:
    """Yield the faults of the reference model."""
    needs_one = selection.strategy in WITH_REFERENCE
    keys = ("selection.reference", "selection.strategy", "selection.options")
    if needs_one and selection.reference is None:
        yield (
            keys,
            f"null leaves {selection.strategy} nothing to compare with; allowed: the Hub id or the folder of a "
            "trained dual encoder that reads the same inputs as the model",
        )
    others = {spec.partition(":")[0] for spec in compare.strategies}
    if selection.reference is not None and not needs_one and not others & set(WITH_REFERENCE):
        yield (
            keys,
            f"{show(selection.reference)} would not be read: {selection.strategy} compares with no reference; set it "
            f"to null, or selection.strategy to one of {', '.join(WITH_REFERENCE)}",
        )
    if selection.strategy == "coreset" and data.streaming:
        yield (
            ("data.streaming", "selection.strategy"),
            "true does not go with selection.strategy coreset, which scores all pairs before the first step; set it "
            "to false, or take learnability, rho or jest",
        )


def objective_conflicts(objective: ObjectiveSection, selection: SelectionSection) -> Iterator[Fault]:
    """Yield the faults of an objective next to another one, or to a strategy."""
    sections = {name: getattr(objective, name) for name in list_robust_objectives()}
    given = {name: dataclasses.asdict(section) for name, section in sections.items() if section is not None}
    if clash := find_clash(selection.strategy, selection.ratio, given):
        others = [f"objective.{name}" for name in given if name != clash[0]]
        yield (f"objective.{clash[0]}", *others, "selection.strategy", "selection.ratio"), clash[1]
    if objective.repair is not None:
        rule = selection.strategy, selection.rescore_every
        problem = find_repair_fault(dataclasses.asdict(objective.repair), *rule, given)
        if problem is not None:
            yield ("objective.repair", *(f"objective.{name}" for name in given), "selection.strategy"), problem


def gsc_conflicts(gsc: GscSection | None, selection: SelectionSection, training: Mapping[str, Any]) -> Iterator[Fault]:
    """Yield the faults of training with soft labels."""
    if gsc is None:
        return
    epochs = training_value(training, "num_train_epochs")
    if selection.mask_false_negatives:
        yield (
            ("objective.gsc", "selection.mask_false_negatives"),
            "does not go with selection.mask_false_negatives, as it counts every other pair of the batch; "
            "set one of them to null or false",
        )
    if training_value(training, "max_steps") <= 0 and gsc.warmup_epochs >= epochs:
        yield (
            ("objective.gsc.warmup_epochs", "training.num_train_epochs", "training.max_steps"),
            f"{gsc.warmup_epochs} leaves no epoch with soft labels; "
            f"allowed: less than training.num_train_epochs ({epochs:g})",
        )


def robust_conflicts(objective: ObjectiveSection, training: Mapping[str, Any]) -> Iterator[Fault]:
    """Yield the faults of the warm-ups of the robust losses."""
    epochs = training_value(training, "num_train_epochs")
    for name in ("rince", "symnce"):
        section = getattr(objective, name)
        warmup_epochs = 0 if section is None else section.warmup_epochs
        if training_value(training, "max_steps") <= 0 < warmup_epochs and warmup_epochs >= epochs:
            yield (
                (f"objective.{name}.warmup_epochs", "training.num_train_epochs", "training.max_steps"),
                f"{warmup_epochs} leaves no epoch with its loss; "
                f"allowed: less than training.num_train_epochs ({epochs:g})",
            )


def twin_conflicts(gsc: GscSection | None, model: ModelSection, adapter: Mapping[str, Any] | None) -> Iterator[Fault]:
    """Yield the faults of two networks that train together."""
    if gsc is None or not gsc.dual:
        if model.second_name_or_path:
            yield (
                ("model.second_name_or_path", "objective.gsc"),
                f"{show(model.second_name_or_path)} would not be read: objective.gsc.dual is not true; set that, or "
                "model.second_name_or_path to null",
            )
    elif adapter is not None:
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


def compare_conflicts(compare: CompareSection) -> Iterator[Fault]:
    """Yield the faults of the strategies and seeds to compare."""
    seen: list[tuple[str, str | None]] = []
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
