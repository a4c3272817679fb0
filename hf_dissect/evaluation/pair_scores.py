"""Scores of a whole data set under the final weights, to see which of its pairs the model takes for mismatched."""

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from hf_dissect.data.model_inputs import forward_inputs
from hf_dissect.selection import CandidateScores, score

if TYPE_CHECKING:
    from hf_dissect.trainer import DissectTrainer


def score_all_pairs(trainer: "DissectTrainer", pairs: Any) -> dict[str, torch.Tensor]:
    """Correlation of every readable pair under the trainer's current weights.

    Returns:
        `sample_id` int64, `correlation` float32 and, where the truth is known, `is_clean` bool, each `(pairs,)` on the
        CPU and the same on all ranks.
    """
    parts = []
    for batch, scores in score_batches(trainer, trainer.get_eval_dataloader(pairs)):
        part = {name: batch[name] for name in ("sample_id", "bad_reason", "is_clean") if name in batch}
        part["correlation"] = scores.correlation.to(trainer.args.device)
        parts.append(trainer.accelerator.gather_for_metrics(part))
    scored = {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}
    good = scored.pop("bad_reason") == 0
    return {name: values[good] for name, values in scored.items()}


def score_batches(
    trainer: "DissectTrainer", batches: Iterable[Mapping[str, torch.Tensor]]
) -> Iterator[tuple[Mapping[str, torch.Tensor], CandidateScores]]:
    """Each batch of an evaluation loader on the trainer's device, with the scores of its pairs."""
    for batch in batches:
        batch = trainer._prepare_inputs(batch)
        yield (
            batch,
            score(
                trainer.model,
                forward_inputs(trainer.model, batch),
                batch["sample_id"],
                kind=trainer.kind,
                autocast=trainer.accelerator.autocast,
            ),
        )
