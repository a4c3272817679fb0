"""The floating-point operations of a run are those that the Trainer counts, and its weights are counted once."""

import pytest
import torch
from testing.tiny_models import tiny_clip, tiny_pairs
from transformers import Trainer

from hf_dissect import DissectTrainer, DissectTrainingArguments
from hf_dissect.training.step_operations import StepOperations


@pytest.mark.parametrize("strategy", ["none", "random"])
def test_a_run_reports_the_operations_of_the_trainer(tmp_path, strategy, monkeypatch):
    model, processor = tiny_clip()
    args = DissectTrainingArguments(
        str(tmp_path),
        selection_strategy=strategy,
        per_device_train_batch_size=8,
        max_steps=3,
        save_strategy="no",
        save_run_folder=False,
        report_to="none",
    )
    trainer = DissectTrainer(model=model, args=args, train_dataset=tiny_pairs(24), processing_class=processor)
    counted, expected = [], []
    plain = model.num_parameters
    monkeypatch.setattr(model, "num_parameters", lambda **kind: counted.append(kind) or plain(**kind))
    step = trainer.training_step

    def training_step(model, inputs, *rest):
        expected.append(6 * inputs["input_ids"].numel() * plain(exclude_embeddings=True))
        return step(model, inputs, *rest)

    trainer.training_step = training_step
    trainer.train()
    assert trainer.state.total_flos == sum(expected) and len(expected) == 3
    assert len([kind for kind in counted if kind.get("exclude_embeddings")]) == 1
    trainer.train()  # counts again, since the model may have changed between two runs
    assert len([kind for kind in counted if kind.get("exclude_embeddings")]) == 2


@pytest.mark.parametrize("shapes", [[(2, 3)], [(0, 3), (2, 3), (4, 7)], [(1,), (0,), (5, 5, 5)]])
def test_each_step_counts_its_own_numbers(shapes):
    model, _ = tiny_clip()
    trainer = Trainer(model=model, train_dataset=[0])
    operations = StepOperations(trainer.floating_point_ops, model)
    for shape in shapes:
        inputs = {"input_ids": torch.zeros(shape, dtype=torch.int64)}
        assert operations(inputs) == trainer.floating_point_ops(inputs)
    assert operations({"pixel_values": torch.zeros(2, 3)}) == 0


def test_a_model_without_a_count_has_none():
    model = torch.nn.Linear(2, 2)
    trainer = Trainer(model=model, train_dataset=[0])
    operations = StepOperations(trainer.floating_point_ops, model)
    assert operations({"input_ids": torch.zeros(2, 3)}) == 0
