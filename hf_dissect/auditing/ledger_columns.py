"""Columns of an audit that come from the ledger of a run on the same pairs."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from hf_dissect.losses.noisy_channel import estimate_matches
from hf_dissect.selection import SampleLedger
from hf_dissect.selection.saved_ledger import has_ledger, read_ledger
from hf_dissect.selection.soft_labels import SoftLabels

logger = logging.getLogger(__name__)

RECORD_FILE = "selection.parquet"
"""Name of the record of all selections in a run folder."""

_EVIDENCE = ("agreement", "structure")  # belong to an unfinished epoch, without meaning afterwards


def open_ledger(path: str | os.PathLike) -> SampleLedger:
    """Open the ledger of a run folder, or a ledger file, with all its columns.

    Raises:
        FileNotFoundError: There is no ledger.
        ValueError: The file is damaged or something else.
    """
    path = Path(path)
    if not (has_ledger(path) if path.is_dir() else path.is_file()):
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
        `ledger_differential`, the history minus the correlation now (DISSect), where there is a history;
        `ledger_label`, the soft label (GSC), where there is one; and `ledger_match`, the probability that a pair is
        matched, by the last evidence of the run (noisy channel), where there is some.

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
    if "evidence" in known:
        columns["ledger_match"] = estimate_matches(known["evidence"])[0]
    return columns


@dataclass(frozen=True)
class EarlierScores:
    """Correlations that a run recorded of its pairs before it had trained on them.

    Attributes:
        values: Correlations, float32 `(n,)`, NaN for a pair without one.
        origin: Origin of the values, for people.
    """

    values: torch.Tensor
    origin: str


def read_earlier_scores(
    folder: str | os.PathLike, ledger: SampleLedger, sample_id: torch.Tensor, selection: Mapping[str, Any]
) -> EarlierScores | None:
    """Read the scores of pairs from before the run trained on them.

    The record of all selections (`selection.record`) has them: the last correlation of a pair up to the step that
    first trained on it. Otherwise, the history of DISSect's warm-up variant does if the warm-up took one epoch, since
    a pair is scored before its batch trains. Every other column of a ledger is from after training.

    Args:
        folder: Run folder, or one of its checkpoints.
        ledger: Ledger of the run.
        sample_id: Ids of the pairs, int64 `(n,)`.
        selection: Selection section of the run's recipe.

    Returns:
        The scores, or None if the run recorded none.
    """
    values = _read_record_if_any(Path(folder), sample_id)
    if values is not None and not values.isnan().all():
        return EarlierScores(values, f"last correlation before training, from {RECORD_FILE}")
    is_warmup = selection.get("strategy") == "dissect" and _find_variant(selection) == "warmup"
    if (
        is_warmup
        and selection.get("warmup_epochs") == 1
        and not selection.get("ledger")
        and "history" in ledger.columns
    ):
        values = ledger.read("history", sample_id)
        if not values.isnan().all():
            return EarlierScores(values, "correlation at the first visit, the history in the ledger")
    return None


def _find_variant(selection: Mapping[str, Any]) -> str:
    return (selection.get("options") or {}).get("variant", "warmup")


def _read_record_if_any(folder: Path, sample_id: torch.Tensor) -> torch.Tensor | None:
    """Read the record of a run, which lies in the run folder also for its checkpoints; None if there is none."""
    places = (folder, folder.parent) if folder.name.startswith("checkpoint-") else (folder,)
    record = next((place / RECORD_FILE for place in places if (place / RECORD_FILE).is_file()), None)
    if record is None:
        return None
    try:
        return _read_record(record, sample_id)
    except (pa.ArrowException, OSError) as error:
        logger.warning("%s is left out, because it cannot be read (%s); it is whole when the run ends.", record, error)
        return None


def _read_record(file: Path, sample_id: torch.Tensor) -> torch.Tensor:
    """Return the last correlation of each pair up to its first training, as deviations from the mean of its epoch."""
    table = pq.read_table(file, columns=["epoch", "step", "sample_id", "correlation", "kept"])
    epoch, step, ids, correlation, kept = (column.to_numpy() for column in table.columns)
    values = correlation.astype(np.float64)
    for number in np.unique(epoch):
        of_epoch = (epoch == number) & np.isfinite(values)
        if of_epoch.any():
            # Correlations of all pairs rise while a model learns.
            values[of_epoch] = (values[of_epoch] - values[of_epoch].mean()) / max(values[of_epoch].std(), 1e-6)
    known, pair = np.unique(ids, return_inverse=True)
    first_trained = np.full(len(known), np.iinfo(np.int64).max)
    np.minimum.at(first_trained, pair[kept], step[kept])
    (usable,) = np.nonzero((step <= first_trained[pair]) & np.isfinite(values))
    usable = usable[np.argsort(step[usable], kind="stable")]
    last = np.full(len(known), np.nan)
    last[pair[usable]] = values[usable]  # the latest of a pair stays
    place = np.searchsorted(known, sample_id.numpy()).clip(max=len(known) - 1)
    found = np.where(known[place] == sample_id.numpy(), last[place], np.nan)
    return torch.from_numpy(found).float()
