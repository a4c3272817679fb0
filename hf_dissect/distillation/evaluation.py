"""Metrics of the networks of a distillation: accuracy, and retrieval of rows of the same class."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from hf_dissect.distillation.data_collator import compute_row_masks


def compute_prediction_metrics(
    predictions: Mapping[str, np.ndarray], label: np.ndarray, row_state: np.ndarray
) -> dict[str, float]:
    """Compute the accuracy of each network and the student's retrieval over `n` rows.

    Args:
        predictions: `NAME_logits` `(n, C)` of student, teacher and auxiliaries, and `student_embeds` `(n, E)`.
        label: Class of each row, int64 `(n,)`.
        row_state: State of each row, int8 `(n,)`. Teacher and auxiliaries are evaluated on complete rows, the student
            on all labelled rows.

    Returns:
        `student_accuracy`, `teacher_accuracy`, `auxiliary_NAME_accuracy` and `retrieval_R@1`, shares in [0, 1].
    """
    has_label, has_auxiliaries = compute_row_masks(row_state)
    metrics = {}
    for name, values in predictions.items():
        network = name.removesuffix("_logits").replace(".", "_")
        counted = has_label if network == "student" else has_label & has_auxiliaries
        if name.endswith("_logits") and counted.any():
            metrics[f"{network}_accuracy"] = float((values.argmax(-1) == label)[counted].mean())
    if has_label.sum() > 1:
        embeds, labels = torch.as_tensor(predictions["student_embeds"][has_label]), torch.as_tensor(label[has_label])
        metrics["retrieval_R@1"] = recall_at_1(embeds, labels)
    return metrics


def list_figures(
    modalities: Sequence[str], evaluated: Sequence[str] | None = None, *, auxiliary_task: bool = True
) -> list[str]:
    """List the figures of `compute_prediction_metrics`.

    Args:
        modalities: Columns of the modalities, the student's first.
        evaluated: Columns of the evaluated data; None for all. Without one of the modalities, the student alone is
            evaluated.
        auxiliary_task: True if the auxiliaries have classifiers.
    """
    figures = ["student_accuracy", "retrieval_R@1"]
    if len(modalities) == 1 or (evaluated is not None and set(modalities) - set(evaluated)):
        return figures
    auxiliaries = modalities[1:] if auxiliary_task else ()
    return [*figures, "teacher_accuracy", *(f"auxiliary_{name}_accuracy" for name in auxiliaries)]


def recall_at_1(
    queries: torch.Tensor,
    query_labels: torch.Tensor,
    gallery: torch.Tensor | None = None,
    gallery_labels: torch.Tensor | None = None,
) -> float:
    """Compute the share of queries whose nearest row of the gallery, by cosine, has their class.

    Args:
        queries: Embeddings of unit length, `(n, E)`.
        query_labels: Classes of the queries, int64 `(n,)`.
        gallery: Embeddings of unit length, `(m, E)`; None for the other queries.
        gallery_labels: Classes of the gallery, int64 `(m,)`.
    """
    itself = gallery is None
    gallery = queries if gallery is None else gallery
    gallery_labels = query_labels if gallery_labels is None else gallery_labels
    right = 0
    for start in range(0, len(queries), 1024):
        cosines = queries[start : start + 1024].float() @ gallery.float().T
        if itself:
            cosines.diagonal(start).fill_(-torch.inf)
        right += int((gallery_labels[cosines.argmax(1)] == query_labels[start : start + 1024]).sum())
    return right / len(queries)
