"""Checks of the balance of clusters and of the penalty of usage against the settings they must agree with."""

from collections.abc import Iterator, Mapping
from typing import Any

from hf_dissect.recipe.fields import training_value
from hf_dissect.recipe.rules import Fault
from hf_dissect.recipe.schema import DataSection, SelectionSection
from hf_dissect.selection.options import find_usage_problem
from hf_dissect.settings import show

_SAMPLING = "train_sampling_strategy"


def balance_conflicts(data: DataSection, selection: SelectionSection, training: Mapping[str, Any]) -> Iterator[Fault]:
    """Yield the faults of a balance of clusters, and of a penalty of usage."""
    settings = {name: getattr(data, name) for name in list_balance_settings()}
    for name, problem in find_balance_faults(settings, selection.strategy, training_value(training, _SAMPLING)):
        other = {"coreset": "selection.strategy", _SAMPLING: f"training.{_SAMPLING}"}
        others = [key for word, key in other.items() if word in problem]
        yield (f"data.{name}", *others, "data.balance_column", "data.sampling_file"), problem
    if data.streaming and data.balance_column is not None and data.sampling_file is None:
        yield (
            ("data.balance_column", "data.sampling_file", "data.streaming"),
            f"{show(data.balance_column)} needs data.sampling_file, as a stream does not know the sizes of its "
            "clusters beforehand; name one that hf_dissect.data.sampling_file.write_cluster_weights wrote, or set "
            "data.streaming to false",
        )
    rule = selection.strategy, selection.ratio, selection.rescore_every
    if selection.usage_penalty and (found := find_usage_problem(*rule)):
        yield (
            ("selection.usage_penalty", "selection.strategy", "selection.ratio", "selection.rescore_every"),
            f"{selection.usage_penalty} {found}",
        )


def list_balance_settings() -> tuple[str, ...]:
    """Return the names of the settings of a balance."""
    return "balance_column", "balance_strength", "balance_max_visits", "sampling_file"


def find_balance_faults(settings: Mapping[str, Any], strategy: str, sampling: str) -> Iterator[tuple[str, str]]:
    """Yield name and problem of each setting of a balance that does not go with the others.

    Args:
        settings: Values of `list_balance_settings`.
        strategy: Name of the selection strategy.
        sampling: Value of `train_sampling_strategy`.
    """
    column, file = settings["balance_column"], settings["sampling_file"]
    given = "balance_column" if column is not None else "sampling_file"
    if column is None and file is None:
        return
    if file is not None and settings["balance_strength"] != DataSection.balance_strength:
        yield (
            "balance_strength",
            f"{settings['balance_strength']} would have no effect: the weights come from sampling_file {show(file)}; "
            "leave one of the two out",
        )
    if strategy == "coreset":
        yield (
            given,
            f"{show(settings[given])} does not go with the strategy coreset, which chooses the pairs of all epochs by "
            "itself; leave it out, or take another strategy",
        )
    if sampling != "random":
        yield (
            given,
            f"{show(settings[given])} does not go with {_SAMPLING} {sampling!r}, as it makes the order of the pairs; "
            "leave one of the two out",
        )
