"""Called by test_reference_pass.py: runs that compare with a reference, in one process or two that choose together."""

import os

import torch

from hf_dissect import DissectTrainer, DissectTrainingArguments
from testing import tiny_models

CANDIDATES = 16


def train_with_reference() -> dict[str, tuple[torch.Tensor, list[int]]]:
    """Return by strategy what the reference left in the ledger, and the ids that the first step kept, sorted."""
    results = {}
    for strategy in ("learnability", "rho", "jest", "coreset"):
        model, processor = tiny_models.tiny_clip()
        trainer = DissectTrainer(
            model,
            DissectTrainingArguments(
                os.devnull + "-unused",
                selection_strategy=strategy,
                selection_scope="global",
                per_device_train_batch_size=CANDIDATES // int(os.environ["WORLD_SIZE"]),
                max_steps=1,
                learning_rate=0.0,
                save_strategy="no",
                save_run_folder=False,
                check_reload=False,
                report_to="none",
                disable_tqdm=True,
            ),
            processing_class=processor,
            train_dataset=tiny_models.tiny_pairs(40),
            reference_model=tiny_models.tiny_clip(seed=5)[0],
        )
        kept, select = [], trainer.selector.select

        def watch(*arguments, kept=kept, select=select, trainer=trainer, **settings):
            batch = select(*arguments, **settings)
            kept += trainer.ranks.gather(batch["sample_id"]).tolist()
            return batch

        trainer.selector.select = watch
        trainer.train()
        column = next(iter(trainer.strategy.columns), "correlation")
        results[strategy] = trainer.ledger.column(column).clone(), sorted(kept)
    return results
