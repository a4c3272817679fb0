"""Parts of `benchmarks/gpu.py` about exactness: a resumed run next to a whole one, and float16 with its scaler."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from gpu_run import Run
from peer_steps import OwnCollator, Pairs, make_model, trainer_settings
from transformers import TrainerCallback

from hf_dissect import DissectTrainer, DissectTrainingArguments

STEPS, SAVED_AT = 6, 3


def _make_trainer(run: Run, folder: Path, pairs: Pairs, size: str, **settings: Any) -> DissectTrainer:
    common = trainer_settings(16, STEPS, run.device) | {"save_run_folder": False, "check_reload": False}
    selection = {"selection_strategy": "dissect", "selection_options": {"variant": "momentum"}}
    return DissectTrainer(
        model=make_model(size),
        args=DissectTrainingArguments(str(folder), **(common | selection | settings)),
        data_collator=OwnCollator(pairs),
        train_dataset=pairs.rows.select_columns(["image", "caption"]),
    )


def _largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max((one[name].float() - other[name].float()).abs().max().item() for name in one)


def measure_resume(run: Run) -> dict[str, Any]:
    """Compare two equal runs and one that is resumed at its middle: weights and ledger."""
    size = run.name_size("small")
    pairs = Pairs(size, 64, run.device)
    found: dict[str, Any] = {"size": size, "steps": STEPS, "resumed_at": SAVED_AT}
    with tempfile.TemporaryDirectory() as name:
        states: dict[str, dict[str, torch.Tensor]] = {}
        for kind in ("first", "second", "resumed"):
            first = Path(name, "first")
            folder = first if kind == "resumed" else Path(name, kind)
            saving = {"save_strategy": "steps", "save_steps": SAVED_AT}
            trainer = _make_trainer(run, folder, pairs, size, **saving)
            trainer.train(str(first / f"checkpoint-{SAVED_AT}") if kind == "resumed" else None)
            weights = {key: value.detach().cpu().clone() for key, value in trainer.model.state_dict().items()}
            ids = torch.arange(len(pairs.rows))
            states[kind] = weights | {"ledger": trainer.ledger.read("correlation", ids).nan_to_num(-2)}
        for kind in ("second", "resumed"):
            difference = _largest_difference(states["first"], states[kind])
            found[f"{kind} run"] = {"same_bits": difference == 0, "largest_difference": difference}
    return found


class _CountSkipped(TrainerCallback):
    """Callback that counts the steps that the scaler skipped, and begins with a scale that must overflow."""

    def __init__(self) -> None:
        self.trainer: DissectTrainer | None = None
        self.skipped: list[bool] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the scale."""
        self.trainer.accelerator.scaler._init_scale = 2.0**40  # type: ignore[union-attr]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note whether the weights stayed as they were."""
        self.skipped.append(self.trainer.accelerator.optimizer_step_was_skipped)  # type: ignore[union-attr]


def measure_fp16(run: Run) -> dict[str, Any]:
    """Train in float16 from a scale that overflows, and count the steps that were skipped until it fits."""
    if run.device != "cuda":
        return {"skipped": "float16 with a scaler needs CUDA"}
    size = "small"
    pairs, counter = Pairs(size, 64, run.device), _CountSkipped()
    with tempfile.TemporaryDirectory() as name:
        settings = {"bf16": False, "fp16": True, "max_steps": 60, "logging_steps": 5}
        counter.trainer = _make_trainer(run, Path(name), pairs, size, **settings)
        counter.trainer.add_callback(counter)
        output = counter.trainer.train()
        scale = counter.trainer.accelerator.scaler.get_scale()
    return {
        "steps": len(counter.skipped),
        "skipped_steps": sum(counter.skipped),
        "last_skipped_step": max((step for step, was in enumerate(counter.skipped) if was), default=None),
        "scale_at_the_end": scale,
        "mean_loss": output.training_loss,
    }
