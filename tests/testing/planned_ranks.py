"""Called by test_ledger_first.py in two processes: they train on as many pairs each, and know the same of all."""

from pathlib import Path

import pyarrow.parquet as pq
import torch
from transformers import TrainerCallback

from hf_dissect import DissectTrainer
from testing.faulty_run import BAD_ROW, make_trainer
from testing.two_ranks import check_equal

RUNS = {
    "small-loss": dict(selection_strategy="small_loss", dataloader_num_workers=1, scoring_batch_size=2),
    "channel": dict(selection_strategy="noisy_channel", gradient_accumulation_steps=2),
    "stream": dict(selection_strategy="noisy_channel", stream=True, dataloader_num_workers=1),
    "chunks": dict(selection_strategy="gsc", grad_cache_chunk_size=2),
}


class CountsPairs(DissectTrainer):
    """Notes how many pairs train in each step."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.sizes = [*getattr(self, "sizes", []), len(inputs["sample_id"])]
        return super().training_step(model, inputs, num_items_in_batch)


def planned_trainer(folder: Path, **settings) -> CountsPairs:
    defaults = {"selection_options": None, "selection_rescore_every": 3, "eval_strategy": "no", "check_reload": False}
    return make_trainer(
        folder, CountsPairs, bad_row=True, **{**defaults, "save_steps": 7, "max_steps": 24, **settings}
    )


class StopAt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 19:
            raise KeyboardInterrupt


def check_all(folder: Path) -> None:
    for name, settings in RUNS.items():
        trainer = planned_trainer(folder / name, **settings)
        trainer.train()
        check_equal(trainer)
        sizes = trainer.ranks.gather(torch.tensor([trainer.sizes]))
        assert torch.equal(sizes[0], sizes[1]) and set(trainer.sizes) == {3, 4}, "a bad row costs both ranks a pair"
        figures = trainer.run_metrics({})["selection"]
        assert figures["loaded_share"] < 0.95 and len(trainer.ledger) >= 63
        whole = {column: trainer.ledger.column(column).clone() for column in trainer.ledger.columns}
        if trainer.is_world_process_zero():
            rows = pq.read_table(folder / name / "selection.parquet").to_pandas()
            per_step = rows.groupby("step").size() / trainer.args.gradient_accumulation_steps
            assert per_step.isin([14, 15, 15.5, 16]).all() and BAD_ROW not in set(rows[rows.kept].sample_id)
        trainer = planned_trainer(folder / f"{name}-stopped", **settings)
        trainer.add_callback(StopAt())
        try:
            trainer.train()
        except KeyboardInterrupt:
            pass
        trainer = planned_trainer(folder / f"{name}-stopped", **settings)
        trainer.train(resume_from_checkpoint=True)
        for column, values in whole.items():
            assert torch.equal(trainer.ledger.column(column).nan_to_num(-1), values.nan_to_num(-1)), (name, column)
