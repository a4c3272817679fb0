"""Loading our `evaluate` modules from the installed package, and a check of columns that `evaluate` leaves out."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from evaluate import EvaluationModule

MODULE_NAMES = ("retrieval", "zero_shot", "noise_detection")


def load(name: str, **kwargs: Any) -> "EvaluationModule":
    """Load one of our `evaluate` modules from the installed package, without any network.

    Args:
        name: `retrieval`, `zero_shot` or `noise_detection`.
        **kwargs: Arguments of `evaluate.load`, such as `experiment_id`, `num_process`, `process_id`, `keep_in_memory`.

    Returns:
        The module.

    Raises:
        ValueError: If no module has that name.
    """
    if name not in MODULE_NAMES:
        raise ValueError(
            f"name is {name!r}, but hf_dissect ships {', '.join(MODULE_NAMES)}. "
            "Load modules of the Hub with evaluate.load."
        )
    import evaluate  # Takes seconds to import, which the plain functions do not need.

    return evaluate.load(str(Path(__file__).parent / name), **kwargs)


def check_columns(columns: Mapping[str, Sequence[Any] | None], expected: Sequence[str]) -> None:
    """Raise a ValueError unless all expected columns are present and of one length.

    Args:
        columns: Values of each column; None for a column that is not given.
        expected: Names of the required columns.
    """
    absent = [name for name in expected if columns.get(name) is None]
    if absent:
        raise ValueError(
            f"Missing {', '.join(absent)}: this module needs {', '.join(expected)}, with one row per example."
        )
    lengths = {name: len(cast(Sequence[Any], columns[name])) for name in expected}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"Columns differ in length, but must have one row per example: {lengths}.")
