"""Finds our `evaluate` modules where they are installed, and says what `evaluate` itself leaves unsaid."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evaluate import EvaluationModule

MODULE_NAMES = ("retrieval", "zero_shot", "noise_detection")


def load(name: str, **kwargs: Any) -> "EvaluationModule":
    """Loads one of our `evaluate` modules from the installed package, without any network.

    Args:
        name: `retrieval`, `zero_shot` or `noise_detection`.
        kwargs: Passed to `evaluate.load`, such as `experiment_id`, `num_process`, `process_id`, `keep_in_memory`.

    Raises:
        ValueError: If there is no such module.
    """
    if name not in MODULE_NAMES:
        raise ValueError(
            f"name is {name!r}, but hf_dissect ships {', '.join(MODULE_NAMES)}. Modules of the Hub: evaluate.load."
        )
    import evaluate  # Takes seconds to import, which who only calls the plain functions need not wait for.

    return evaluate.load(str(Path(__file__).parent / name), **kwargs)


def check_columns(columns: Mapping[str, Sequence | None], expected: Sequence[str]) -> None:
    """Raises `ValueError` unless `columns` holds all `expected` ones, and of one length."""
    absent = [name for name in expected if columns.get(name) is None]
    if absent:
        raise ValueError(f"Missing {', '.join(absent)}: this module needs {', '.join(expected)}, one row per example.")
    lengths = {name: len(columns[name]) for name in expected}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"Columns differ in length, but must have one row per example: {lengths}.")
