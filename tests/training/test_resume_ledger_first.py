"""A ledger-first run that is stopped between two checkpoints ends, bit for bit, as if it had not been stopped."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from testing.faulty_run import make_trainer
from transformers import TrainerCallback

STEPS = 24  # six passes over 64 pairs; the plan decides from the third on
SETTINGS = {
    "per_device_train_batch_size": 16,
    "max_steps": STEPS,
    "selection_options": None,
    "selection_rescore_every": 3,
    "eval_strategy": "no",
    "check_reload": False,
    "dropout": 0.1,
}


class StopAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def outcome(trainer) -> dict:
    tensors = {name: weight.detach() for name, weight in trainer.model.named_parameters()}
    tensors |= {f"ledger {name}": trainer.ledger.column(name) for name in trainer.ledger.columns}
    tensors["ids"] = trainer.ledger.ids
    times = ("time", "per_second", "train_loss")
    return {
        "tensors": {name: tensor.clone().numpy().tobytes() for name, tensor in tensors.items()},
        "choices": pq.read_table(Path(trainer.args.output_dir) / "selection.parquet").to_pandas().to_csv(),
        "logs": [
            {key: value for key, value in entry.items() if not any(part in key for part in times)}
            for entry in trainer.state.log_history
        ],
        "selection": trainer.run_metrics({})["selection"],
        "bad rows": trainer.bad_rows.state_dict(),
    }


CASES = {
    "map, noisy channel, two micro-batches": dict(
        selection_strategy="noisy_channel", per_device_train_batch_size=8, gradient_accumulation_steps=2
    ),
    "stream, small loss, two workers": dict(selection_strategy="small_loss", stream=True, dataloader_num_workers=2),
}
MORE_CASES = {
    "map, small loss, two workers, a bad row": dict(
        selection_strategy="small_loss", dataloader_num_workers=2, bad_row=True
    ),
    "map, dissect in chunks": dict(
        selection_strategy="dissect", selection_options={"variant": "momentum"}, grad_cache_chunk_size=3
    ),
    "map, random": dict(selection_strategy="random"),
    "stream, noisy channel, two micro-batches, a bad row": dict(
        selection_strategy="noisy_channel",
        stream=True,
        bad_row=True,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
    ),
    "stream, gsc, a worker that reads far ahead": dict(
        selection_strategy="gsc", stream=True, dataloader_num_workers=1, dataloader_prefetch_factor=5
    ),
}


def check_resumed(folder: Path, stops: tuple[int, ...], settings: dict) -> None:
    trainer = make_trainer(folder / "whole", **settings, save_steps=STEPS)
    trainer.train()
    whole = outcome(trainer)
    assert whole["selection"]["loaded_share"] < 0.95
    settings = {**settings, "save_steps": 1 if len(stops) > 1 else 6}
    trainer = make_trainer(folder / "run", **settings)
    for stop in stops:
        trainer.add_callback(StopAt(stop))
        with pytest.raises(KeyboardInterrupt):
            trainer.train(resume_from_checkpoint=stop > stops[0])
        trainer = make_trainer(folder / "run", **settings)
    trainer.train(resume_from_checkpoint=True)
    assert outcome(trainer) == whole


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_the_uninterrupted_one(case, tmp_path):
    check_resumed(tmp_path, (13,), {**SETTINGS, **CASES[case]})


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE_CASES)
def test_so_is_one_that_is_resumed_again_and_again(case, tmp_path):
    # A run stops where a checkpoint was written at the end, at the beginning and in the middle of a pass.
    check_resumed(tmp_path, (8, 13, 18, 23), {**SETTINGS, **MORE_CASES[case]})
