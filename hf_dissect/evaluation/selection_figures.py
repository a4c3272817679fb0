"""Figures of a selection run for `metrics.json`."""

from collections.abc import Mapping

import torch

from hf_dissect.evaluation import noise_detection_metrics
from hf_dissect.selection.ledger import SampleLedger
from hf_dissect.selection.monitor import SelectionMonitor
from hf_dissect.selection.soft_labels import find_label_columns


def compute_selection_figures(monitor: SelectionMonitor) -> dict[str, float | None]:
    """Compute the figures of a selection.

    Args:
        monitor: Monitor of the selections of a run.

    Returns:
        Figures of the kept and the dropped pairs over the run and, as `*_last_epoch`, over its last epoch. If the
        truth is known, `ranking_auroc_last_epoch` says how well the ranking separates matched from mismatched pairs.
    """
    figures: dict[str, float | None] = dict(monitor.run.figures())
    last = monitor.last_epoch.sums.figures()
    figures.update({f"{key}_last_epoch": value for key, value in last.items()})
    if (ranking := monitor.ranking_truth()) is not None:
        figures["ranking_auroc_last_epoch"] = noise_detection_metrics(*ranking)["auroc"]
    return figures


def compute_noise_figures(scored: Mapping[str, torch.Tensor]) -> dict[str, float | None]:
    """Compute the separation of matched from mismatched pairs by the final model.

    Args:
        scored: Columns `correlation` float32 and `is_clean` bool, `(n,)` each.

    Returns:
        Figures of `noise_detection_metrics` as `noise_detection_*`.
    """
    metrics = noise_detection_metrics(scored["correlation"], scored["is_clean"])
    return {f"noise_detection_{key}": value for key, value in metrics.items()}


def compute_label_figures(
    ledger: SampleLedger, sample_id: torch.Tensor, is_clean: torch.Tensor
) -> dict[str, float | None]:
    """Compute the separation of matched from mismatched pairs by the final labels, without the unlabelled pairs.

    Args:
        ledger: Ledger of the run.
        sample_id: Sample ids, int64 `(n,)`.
        is_clean: Truth, bool `(n,)`.

    Returns:
        `label_auroc` of the soft labels (for two networks, of their mean), `p_clean_auroc` and `evidence_auroc`, each
        if the ledger has the columns.
    """
    figures: dict[str, float | None] = {}
    if (labels := read_soft_labels(ledger, sample_id)) is not None:
        figures["label_auroc"] = noise_detection_metrics(labels, is_clean)["auroc"]
    for name in ("p_clean", "evidence"):
        if name in ledger.columns:
            figures[f"{name}_auroc"] = noise_detection_metrics(ledger.read_anywhere(name, sample_id), is_clean)[
                "auroc"
            ]
    return figures


def read_soft_labels(ledger: SampleLedger, sample_id: torch.Tensor) -> torch.Tensor | None:
    """Return the soft labels of some pairs.

    Args:
        ledger: Ledger of the run.
        sample_id: Sample ids, int64 `(n,)`.

    Returns:
        Labels, float32 `(n,)`, for two networks their mean; None if the ledger has none.
    """
    if not (networks := find_label_columns(ledger)):
        return None
    return torch.stack(
        [torch.minimum(*(ledger.read_anywhere(name, sample_id) for name in pair)) for pair in networks]
    ).mean(0)
