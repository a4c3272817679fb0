"""Embeddings of a whole data set, with what tells its pairs apart and which of them cannot be read."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from tqdm.auto import tqdm

from hf_dissect.data.pairs import PairDataset
from hf_dissect.evaluation.pair_scores import score_batches

if TYPE_CHECKING:
    from hf_dissect.trainer import DissectTrainer

_KEPT = ("sample_id", "image_key", "caption_key", "bad_reason", "is_clean")


@dataclass(frozen=True)
class PairEmbeddings:
    """What a model makes of `n` pairs, in their order in the data set, on the CPU.

    Attributes:
        image, text: float32 `(n, D)`, unit length; of a pair that cannot be read without meaning.
        sample_id: int64 `(n,)`.
        image_key, caption_key: int64 `(n,)`, equal where pairs share an image, or a caption.
        bad_reason: int8 `(n,)`, see `BadReason`.
        is_clean: bool `(n,)`, None where the truth is not known.
    """

    image: torch.Tensor
    text: torch.Tensor
    sample_id: torch.Tensor
    image_key: torch.Tensor
    caption_key: torch.Tensor
    bad_reason: torch.Tensor
    is_clean: torch.Tensor | None = None


def embed_pairs(trainer: "DissectTrainer", pairs: PairDataset) -> PairEmbeddings:
    """Embed every pair under the trainer's current weights; on all ranks the same."""
    parts = []
    silent = not trainer.is_world_process_zero()
    batches = tqdm(trainer.get_eval_dataloader(pairs), desc="reading pairs", unit="batch", disable=silent)
    for batch, scores in score_batches(trainer, batches):
        part = {name: batch[name] for name in _KEPT if name in batch}
        part |= {"image": scores.image_embeds, "text": scores.text_embeds}
        gathered = trainer.accelerator.gather_for_metrics(part)
        parts.append({name: values.cpu() for name, values in gathered.items()})
    return PairEmbeddings(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})
