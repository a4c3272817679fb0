"""Called by test_balanced_training.py in two processes: they visit what one visits, and agree after a resume."""

from pathlib import Path

import torch
from transformers import TrainerCallback

from hf_dissect import DissectTrainer, DissectTrainingArguments
from testing import tiny_models
from testing.two_ranks import check_equal

ROWS = 60
CLUSTERS = ["large" if row % 6 else ("small" if row % 12 else None) for row in range(ROWS)]
"""50 large, 5 small and 5 without a cluster."""
SIZES = {"large": 50, "small": 5, None: 5}


def table():
    pairs = tiny_models.tiny_pairs(ROWS).add_column("cluster", CLUSTERS)
    return pairs.add_column("key", [f"k{row}" for row in range(ROWS)])


def make_trainer(
    folder: Path, train=None, stream=False, evaluation=None, reference=None, **settings
) -> DissectTrainer:
    """A trainer whose attribute `seen` lists the ids of each candidate batch of this rank."""
    model, processor = tiny_models.tiny_clip()
    train = table() if train is None else train
    defaults = dict(
        per_device_train_batch_size=4, selection_strategy="random", balance_column="cluster", num_train_epochs=4,
        learning_rate=1e-3, save_strategy="no", save_run_folder=False, report_to="none", disable_tqdm=True,
        use_cpu=True, check_reload=False, logging_steps=5,
    )  # fmt: skip
    if stream:
        train = train.to_iterable_dataset(4)
        defaults |= {"max_steps": 24, "id_column": "key", "shuffle_buffer": 8}
    trainer = DissectTrainer(
        model=model,
        processing_class=processor,
        train_dataset=train,
        eval_dataset=evaluation,
        reference_model=None if reference is None else tiny_models.tiny_clip(reference)[0],
        args=DissectTrainingArguments(str(folder), **{**defaults, **settings}),
    )
    trainer.seen = []
    select = trainer.selector.select

    def noted(model, batch, **given):
        ids = batch["sample_id"].tolist()
        trainer.seen.append(ids + batch["unloaded_id"].tolist() if "unloaded_id" in batch else ids)
        return select(model, batch, **given)

    trainer.selector.select = noted
    return trainer


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def stop_and_resume(folder: Path, stop: int, **settings) -> DissectTrainer:
    trainer = make_trainer(folder, save_strategy="steps", save_steps=5, **settings)
    trainer.add_callback(StopAt(stop))
    try:
        trainer.train()
    except KeyboardInterrupt:
        pass
    trainer = make_trainer(folder, save_strategy="steps", save_steps=5, **settings)
    trainer.train(resume_from_checkpoint=True)
    return trainer


def check_all(folder: Path) -> None:
    weights = folder / "weights.parquet"
    for name, settings in {
        "table": {"dataloader_drop_last": True},
        "penalty": {"selection_usage_penalty": 1.0, "selection_scope": "global", "dataloader_drop_last": True},
        "stream": {"stream": True, "sampling_file": str(weights), "dataloader_num_workers": 1},
        "plan": {"selection_rescore_every": 3, "dataloader_drop_last": True},
        "coreset": {"selection_strategy": "coreset", "balance_column": None, "reference": 3},
    }.items():
        whole = make_trainer(folder / name, **settings)
        whole.train()
        check_equal(whole)
        # A pair of an epoch is not in the batches of two ranks at the same time.
        for own in whole.seen:
            if settings.get("stream"):
                assert len(set(own)) == len(own)
                continue
            both = whole.ranks.gather_objects(own)
            together = [one for part in both for one in part]
            assert len(set(together)) == len(together)
        resumed = stop_and_resume(folder / f"{name}-stopped", 13, **settings)
        check_equal(resumed)
        for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
            assert torch.equal(one, other), name
        everyone = whole.ranks.gather_objects(whole.seen)
        if whole.is_world_process_zero():
            torch.save(everyone, folder / f"{name}.pt")
