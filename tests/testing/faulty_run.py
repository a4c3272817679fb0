"""Small runs that are bit for bit the same each time, and one that is killed while it saves."""

import os
import signal
from pathlib import Path

from datasets import Dataset
from transformers.models.clip.modeling_clip import CLIPAttention

from hf_dissect import DissectTrainer, DissectTrainingArguments
from hf_dissect.data import shuffle_captions
from testing import tiny_models

STEPS = 16  # two passes over 64 pairs
SAVE_STEPS = 3
BAD_ROW = 7
SETTINGS = {
    "per_device_train_batch_size": 8,
    "max_steps": STEPS,
    "learning_rate": 1e-3,
    "save_steps": SAVE_STEPS,
    "logging_steps": 4,
    "shuffle_buffer": 16,
    "max_bad_fraction": 0.05,
    "selection_options": {"variant": "momentum"},
    "record_selection": True,
    "save_run_folder": False,
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}
KILLED_IN = ("_save_optimizer_and_scheduler", "_name_best_checkpoint")
"""Methods that begin when only the weights are written, and when all is written but the checkpoint has no name yet."""


def make_trainer(
    folder: Path,
    kind: type[DissectTrainer] = DissectTrainer,
    *,
    stream: bool = False,
    bad_row: bool = False,
    dropout: float = 0.0,
    **settings,
) -> DissectTrainer:
    """A trainer of a tiny CLIP on 64 pairs, a quarter of them with shuffled captions.

    Args:
        folder: the run folder.
        kind: class of the trainer.
        stream: whether the pairs are a stream of four shards.
        bad_row: whether the picture of row `BAD_ROW` cannot be read.
        dropout: of the attention in both towers.
        settings: changes of `SETTINGS`.
    """
    model, processor = tiny_models.tiny_clip()
    for module in model.modules():
        if isinstance(module, CLIPAttention):
            module.dropout = dropout
    pairs = shuffle_captions(tiny_models.tiny_pairs(64), rate=0.25)
    if bad_row:
        images = [row["image"] for row in pairs]
        images[BAD_ROW] = {"bytes": b"no picture", "path": None}
        pairs = Dataset.from_dict({**pairs[:], "image": images}, features=pairs.features)
    return kind(
        model=model,
        processing_class=processor,
        train_dataset=pairs.to_iterable_dataset(4) if stream else pairs,
        eval_dataset=tiny_models.tiny_pairs(16, seed=1),
        args=DissectTrainingArguments(str(folder), **{**SETTINGS, **settings}),
    )


def killed_in(place: str) -> type[DissectTrainer]:
    """A trainer that kills its process where its second checkpoint comes to the method `place`."""

    def killed(self, *arguments):
        if self.state.global_step == 2 * SAVE_STEPS:
            os.kill(os.getpid(), signal.SIGKILL)
        return getattr(super(kind, self), place)(*arguments)

    kind = type("KilledTrainer", (DissectTrainer,), {place: killed})
    return kind


def train_until_killed(folder: Path, place: str) -> None:
    """Train in a process that dies where `killed_in` says."""
    make_trainer(folder, killed_in(place)).train()
