"""Figures of a selection run for `metrics.json`."""

from collections.abc import Mapping

import torch

from hf_dissect.evaluation import noise_detection_metrics
from hf_dissect.selection.ledger import SampleLedger
from hf_dissect.selection.monitor import SelectionMonitor
from hf_dissect.selection.soft_labels import label_columns


def selection_figures(monitor: SelectionMonitor) -> dict[str, float]:
    """Return figures of the kept pairs, of the run and its last epoch (`*_last_epoch`), with the ranking's AUROC."""
    figures = dict(monitor.run.figures())
    last = monitor.last_epoch.sums.figures()
    figures.update({f"{key}_last_epoch": value for key, value in last.items()})
    if (ranking := monitor.ranking_truth()) is not None:
        figures["ranking_auroc_last_epoch"] = noise_detection_metrics(*ranking)["auroc"]
    return figures


def noise_figures(scored: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Return how well the final model separates matched from mismatched pairs, as `noise_detection_*`.

    Args:
        scored: `correlation` float32 and `is_clean` bool, `(n,)` each.
    """
    metrics = noise_detection_metrics(scored["correlation"], scored["is_clean"])
    return {f"noise_detection_{key}": value for key, value in metrics.items()}


def label_figures(ledger: SampleLedger, sample_id: torch.Tensor, is_clean: torch.Tensor) -> dict[str, float | None]:
    """Return how well the final labels separate matched from mismatched pairs; pairs without a label are left out.

    Args:
        ledger: Ledger of the run.
        sample_id: Sample ids, int64 `(n,)`.
        is_clean: Truth, bool `(n,)`.

    Returns:
        `label_auroc` of the soft labels (for two networks, of their mean) and `p_clean_auroc`, as far as the ledger
        has the columns.
    """
    figures = {}
    if (labels := soft_labels(ledger, sample_id)) is not None:
        figures["label_auroc"] = noise_detection_metrics(labels, is_clean)["auroc"]
    if "p_clean" in ledger.columns:
        figures["p_clean_auroc"] = noise_detection_metrics(ledger.read("p_clean", sample_id), is_clean)["auroc"]
    return figures


def soft_labels(ledger: SampleLedger, sample_id: torch.Tensor) -> torch.Tensor | None:
    """Return the soft labels `(n,)` of pairs `(n,)`, for two networks their mean; None if the ledger has none."""
    if not (networks := label_columns(ledger)):
        return None
    return torch.stack([torch.minimum(*(ledger.read(name, sample_id) for name in pair)) for pair in networks]).mean(0)
