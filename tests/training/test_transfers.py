"""Batches on their way to the device: from page-locked memory, and without waiting."""

import pytest
import torch
from datasets import Dataset
from testing import tiny_models
from torch.overrides import TorchFunctionMode

from hf_dissect import DissectTrainer, DissectTrainingArguments
from hf_dissect.selection.loop_hooks import LoopHooks


class NoteMoves(TorchFunctionMode):
    """Notes the keyword `non_blocking` of each `Tensor.to`."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[bool] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.to:
            self.waits.append(not (kwargs or {}).get("non_blocking", False))
        return function(*args, **(kwargs or {}))


def test_the_selector_moves_without_waiting():
    batch = {"pixel_values": torch.zeros(2, 3), "sample_id": torch.arange(2)}
    with NoteMoves() as moves:
        moved = LoopHooks().move(torch.nn.Linear(2, 2, device="meta"), batch)
    assert moves.waits == [False, False] and {value.device.type for value in moved.values()} == {"meta"}
    with NoteMoves() as moves:
        moved = LoopHooks(prepare=lambda rows: {**rows, "more": 1}).move(torch.nn.Linear(2, 2, device="meta"), batch)
    assert moves.waits == [False, False] and moved["more"] == 1


def test_a_copy_back_to_the_host_waits_and_weights_on_the_host_move_nothing():
    batch = {"pixel_values": torch.zeros(2, 3, device="meta")}
    with NoteMoves() as moves:
        LoopHooks().move(torch.nn.Linear(2, 2, device="meta"), batch)
    assert moves.waits == [True]  # it is there already; from another device the host would read too early
    kept = LoopHooks().move(torch.nn.Linear(2, 2), batch)
    assert kept["pixel_values"].device.type == "meta"


class OnAccelerator(DissectTrainingArguments):
    """Arguments as on a machine with an accelerator."""

    device = torch.device("meta")


@pytest.mark.parametrize(
    ("given", "pinned", "waits"),
    [
        ({}, True, False),
        ({"accelerator_config": {"split_batches": False}}, True, False),
        ({"accelerator_config": {"non_blocking": False}}, True, True),
        ({"accelerator_config": {"non_blocking": True}}, True, False),
        ({"dataloader_pin_memory": False}, False, True),
    ],
)
def test_loaders_pin_and_do_not_wait(given, pinned, waits, tmp_path):
    args = OnAccelerator(str(tmp_path), **given)
    assert args.dataloader_pin_memory is pinned and args.accelerator_config.non_blocking is not waits


def test_nothing_is_pinned_without_an_accelerator(tmp_path):
    args = DissectTrainingArguments(str(tmp_path), use_cpu=True)
    assert not args.dataloader_pin_memory and not args.accelerator_config.non_blocking


@pytest.mark.parametrize("kind", ["stored", "planned", "stream"])
@pytest.mark.parametrize("pinned", [True, False])
def test_every_loader_pins_as_the_arguments_say(kind, pinned, tmp_path):
    model, processor = tiny_models.tiny_clip()
    rows: Dataset = tiny_models.tiny_pairs(32)
    args = DissectTrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=8,
        max_steps=2,
        use_cpu=True,
        report_to="none",
        selection_strategy="small_loss",
        selection_rescore_every=2 if kind == "planned" else 1,
    )
    data = rows.to_iterable_dataset(num_shards=2) if kind == "stream" else rows
    trainer = DissectTrainer(model=model, args=args, train_dataset=data, processing_class=processor)
    trainer.args.dataloader_pin_memory = pinned
    loader = trainer.get_train_dataloader()
    assert getattr(loader, "base_dataloader", loader).pin_memory is pinned
