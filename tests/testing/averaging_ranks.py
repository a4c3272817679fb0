"""Called by test_averaged_weights.py in two processes: trains, resumes, and compares the means of both."""

from pathlib import Path

import torch
from transformers import TrainerCallback

from hf_dissect import DissectTrainer, DissectTrainingArguments
from testing import tiny_models


class Sum(TrainerCallback):
    """Adds the weights of the steps after `start`."""

    def __init__(self, start: int):
        self.start, self.total, self.count = start, 0.0, 0

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step > self.start:
            self.total = self.total + flat(model)
            self.count += 1


def flat(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([weight.detach().double().flatten() for weight in model.parameters()])


def make_trainer(folder: Path, batch_size: int = 8) -> DissectTrainer:
    """A trainer of 8 steps on the candidates of all processes, the last 6 of them averaged."""
    model, processor = tiny_models.tiny_clip()
    return DissectTrainer(
        model=model,
        processing_class=processor,
        train_dataset=tiny_models.tiny_pairs(64),
        args=DissectTrainingArguments(
            str(folder),
            average_weights=0.75,
            selection_strategy="random",
            per_device_train_batch_size=batch_size,
            num_train_epochs=2,
            learning_rate=1e-2,
            save_strategy="steps",
            save_steps=2,
            save_run_folder=False,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
    )


def train_and_resume(place: Path) -> dict[str, torch.Tensor]:
    """Check that the processes agree and resume alike; return the final weights and the mean of those in training."""
    trainer, total = make_trainer(place / "two"), Sum(start=2)
    trainer.add_callback(total)
    trainer.train()
    weights = flat(trainer.model)
    both = trainer.ranks.gather(weights[None])
    assert torch.equal(both[0], both[1]) and total.count == 6
    for step in (2, 4, 6, 8):
        resumed = make_trainer(place / "resumed")
        resumed.train(resume_from_checkpoint=str(place / "two" / f"checkpoint-{step}"))
        assert torch.equal(flat(resumed.model), weights), f"resumed from step {step}"
    return {"weights": weights, "mean": total.total / total.count}
