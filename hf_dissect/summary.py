"""Figures of a selection run for `metrics.json`, made of what trainer and selector know."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import TrainerState

from hf_dissect.data.bad_rows import BadRows
from hf_dissect.distributed import Ranks
from hf_dissect.evaluation import noise_detection_metrics
from hf_dissect.evaluation.selection_figures import label_figures, selection_figures
from hf_dissect.models.adapters import describe_adapter
from hf_dissect.selection import OnlineSelector, SampleLedger
from hf_dissect.training.run_folder import changed_settings, finite, installed_versions, times_of_parts
from hf_dissect.training.time_spent import TimeSpent
from hf_dissect.training_args import DissectTrainingArguments

SHOWN_SETTINGS = ("selection_strategy", "selection_ratio")
"""Settings that are shown even if they have their default."""


def selection_metrics(
    selector: OnlineSelector,
    *,
    model: nn.Module,
    args: DissectTrainingArguments,
    state: TrainerState,
    times: TimeSpent,
    num_pairs: int | None,
    final: Mapping[str, Any],
    label_quality: Mapping[str, float | None],
) -> dict[str, Any]:
    """Return the content of `metrics.json` as far as one process knows it: all but the bad rows.

    Args:
        selector: Selector of the run.
        model: Trained model.
        args: Arguments of the run.
        state: State of the Trainer.
        times: Seconds of the parts of the run.
        num_pairs: Number of training pairs, None for a stream.
        final: Final figures.
        label_quality: Figures of `label_figures`, as far as they are known.
    """
    adapter = describe_adapter(model)
    return finite(
        {
            "name": selector.strategy.name,
            "strategy": selector.strategy.name,
            "seed": args.seed,
            "steps": state.global_step,
            "num_pairs": num_pairs,
            "final": final,
            "selection": {**selection_figures(selector.monitor), **label_quality},
            "times": times_of_parts(times.so_far(), ("data", "scoring", "training", "evaluation")),
            **({} if adapter is None else {"adapter": adapter}),
            "settings": changed_settings(args, always=SHOWN_SETTINGS),
            "versions": installed_versions(),
        }
    )


def noise_figures(
    scored: Mapping[str, torch.Tensor], ledger: SampleLedger
) -> tuple[dict[str, float], dict[str, float | None]]:
    """Return how well the final model, and the labels in the ledger, separate matched from mismatched pairs.

    Args:
        scored: `sample_id`, `correlation` and `is_clean`, `(n,)` each.
        ledger: Ledger of the run.

    Returns:
        `noise_detection_*` of the correlation, and the figures of `label_figures`.
    """
    metrics = noise_detection_metrics(scored["correlation"], scored["is_clean"])
    labels = label_figures(ledger, scored["sample_id"], scored["is_clean"])
    return {f"noise_detection_{key}": value for key, value in metrics.items()}, labels


def summarise_bad_rows(bad_rows: BadRows, ranks: Ranks) -> dict[str, Any]:
    """Return the bad rows of all ranks; called on all of them."""
    everywhere = BadRows(bad_rows.max_fraction)
    everywhere.load_state_dict(BadRows.join_states(ranks.gather_objects(bad_rows.state_dict())))
    return everywhere.summary()
