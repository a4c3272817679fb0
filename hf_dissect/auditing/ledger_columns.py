"""Columns of an audit that come from the ledger of a run on the same pairs."""

import os
from pathlib import Path

import torch

from hf_dissect.selection import SampleLedger
from hf_dissect.selection.ledger import LEDGER_FILE, read_ledger
from hf_dissect.selection.soft_labels import SoftLabels

_EVIDENCE = ("agreement", "structure")  # belong to an unfinished epoch, without meaning afterwards


def open_ledger(path: str | os.PathLike) -> SampleLedger:
    """Open the ledger of a run folder, or a ledger file, with all its columns.

    Raises:
        FileNotFoundError: There is no ledger.
        ValueError: The file is damaged or something else.
    """
    path = Path(path)
    path = path / LEDGER_FILE if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"No ledger at {path}; name the folder of a finished run.")
    saved = read_ledger(path)
    ledger = SampleLedger(saved.num_samples, columns=tuple(saved.columns))
    for name, values in saved.columns.items():
        ledger.write(name, saved.ids, values)
    return ledger


def read_ledger_columns(
    ledger: SampleLedger, sample_id: torch.Tensor, correlation: torch.Tensor, *, by_row: bool
) -> dict[str, torch.Tensor]:
    """Read the columns of a ledger for the pairs of a data set.

    Args:
        ledger: Ledger of a run.
        sample_id: All ids of the audited data set, int64 `(n,)`.
        correlation: Correlation of the pairs now, float32 `(n,)`.
        by_row: True for ids that are row numbers.

    Returns:
        Columns, float32 `(n,)` each, NaN where the run did not meet a pair: `ledger_<column>`;
        `ledger_differential`, the history minus the correlation now (DISSect), where there is a history; and
        `ledger_label`, the soft label (GSC), where there is one.

    Raises:
        ValueError: No pair of the ledger is among these.
    """
    if by_row != (ledger.num_samples is not None) or (by_row and ledger.num_samples != len(sample_id)):
        held = "arbitrary ids" if ledger.num_samples is None else f"the row numbers of {ledger.num_samples} pairs"
        ids = f"the row numbers of {len(sample_id)} pairs" if by_row else "ids of their own"
        raise ValueError(f"The ledger has {held}, the data {ids}; name the data set of its run, all of it.")
    read = {name: ledger.read(name, sample_id) for name in ledger.columns if name not in _EVIDENCE}
    known = {name: values for name, values in read.items() if not values.isnan().all()}
    if not known:
        raise ValueError("None of the pairs is in the ledger; name the data set of its run.")
    columns = {f"ledger_{name}": values for name, values in known.items()}
    if "history" in known:
        columns["ledger_differential"] = known["history"] - correlation
    if {"y_cm", "y_im"} <= set(ledger.columns):
        label = SoftLabels().of(ledger, sample_id)
        columns["ledger_label"] = torch.where(ledger.read("y_cm", sample_id).isnan(), torch.nan, label)
    return columns
