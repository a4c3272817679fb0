"""Run by test_ranks.py in two processes: trains, compares, and checks what each process must know of the other."""

import sys
from pathlib import Path

import pyarrow.parquet as pq
import tiny_models
import torch
from accelerate import Accelerator
from tiny_recipe import write_tiny_recipe

from hf_dissect import DissectTrainer, DissectTrainingArguments
from hf_dissect.cli import main
from hf_dissect.data import shuffle_captions
from hf_dissect.ranks import Ranks

torch.set_num_threads(1)


def check_exchange() -> None:
    """Gathering knows the order of the ranks, lengths that differ, and nothing at all."""
    accelerator = Accelerator(cpu=True)
    ranks, rank = Ranks(accelerator), accelerator.process_index
    assert not ranks.alone and accelerator.num_processes == 2
    assert ranks.smallest(7 - rank) == 6
    assert ranks.gather(torch.tensor([rank, 10 + rank])).tolist() == [0, 10, 1, 11]
    # Rank 0 has one value, rank 1 has three; then rank 0 has none; then neither has any.
    assert ranks.gather_ragged(torch.arange(1 + 2 * rank)).tolist() == [0, 0, 1, 2]
    assert ranks.gather_ragged(torch.full((rank,), 0.5)).tolist() == [0.5]
    assert ranks.gather_ragged(torch.zeros(0, dtype=torch.bool)).tolist() == []
    assert ranks.gather_ragged(torch.tensor([rank == 1])).tolist() == [False, True]


def check_training(folder: Path) -> None:
    """Both processes end with the same ledger and weights, and the record holds the candidates of both."""
    model, processor = tiny_models.tiny_clip()
    pairs = shuffle_captions(tiny_models.tiny_pairs(64), rate=0.25)
    rows = pairs.to_list()
    rows[7]["caption"] = None  # one rank has a candidate less than the other when it meets this row
    trainer = DissectTrainer(
        model=model,
        processing_class=processor,
        train_dataset=type(pairs).from_list(rows, features=pairs.features),
        eval_dataset=tiny_models.tiny_pairs(9, seed=1),
        args=DissectTrainingArguments(
            str(folder),
            per_device_train_batch_size=8,
            num_train_epochs=3,
            record_selection=True,
            max_bad_fraction=0.1,
            logging_steps=2,
            learning_rate=1e-3,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
    )
    trainer.train()
    check_equal(trainer)
    seen = trainer.ledger.column("history").isfinite()
    assert seen.sum() == 63 and not seen[7]
    # Nine evaluation rows do not divide by two: none may be counted twice.
    assert trainer.evaluate()["eval_image_to_text_R@10"] == 100
    if trainer.is_world_process_zero():
        check_record(folder)


def check_equal(trainer: DissectTrainer) -> None:
    weights = torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()])
    for name, values in {
        **{name: trainer.ledger.column(name) for name in trainer.ledger.columns},
        "weights": weights,
    }.items():
        both = trainer.ranks.gather(values.float().nan_to_num(-1)[None])
        assert torch.equal(both[0], both[1]), f"{name} differs between the processes"


def check_adapter(folder: Path, variant: str) -> None:
    """A MoLA adapter ends equal on both processes, its router decorrelated over the pairs of both."""
    model, processor = tiny_models.tiny_clip()
    pairs = tiny_models.tiny_pairs(64)
    torch.manual_seed(0)
    trainer = DissectTrainer(
        model=tiny_models.with_mola(model, variant, train_base="all", init_weights=False),
        processing_class=processor,
        train_dataset=pairs.add_column("task", [row // 2 % 2 for row in range(64)]),
        args=DissectTrainingArguments(
            str(folder),
            task_column="task",
            per_device_train_batch_size=8,
            max_steps=6,
            save_strategy="steps",
            save_steps=3,
            selection_options={"variant": "momentum"},
            logging_steps=2,
            learning_rate=1e-3,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
    )
    before = torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()])
    trainer.train()
    check_equal(trainer)
    assert not torch.equal(before, torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()]))
    logged = [entry["decorrelation_loss"] for entry in trainer.state.log_history if "decorrelation_loss" in entry]
    assert len(logged) == (3 if variant == "router" else 0)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    check_equal(trainer)
    assert (folder / "base_model" / "model.safetensors").is_file()


def check_record(folder: Path) -> None:
    rows = pq.read_table(folder / "selection.parquet").to_pandas()
    assert len(rows) == 3 * 63 and set(rows.step) == set(range(12))
    for _, part in rows.groupby("epoch"):
        assert sorted(part.sample_id) == [i for i in range(64) if i != 7]
    assert rows.groupby("step").size().isin([15, 16]).all() and rows.groupby("step").kept.sum().isin([7, 8]).all()


if __name__ == "__main__":
    place = Path(sys.argv[1])
    check_exchange()
    check_training(place / "trainer")
    for variant in ("router", "grad"):
        check_adapter(place / variant, variant)
    recipe = write_tiny_recipe(place / f"tiny-{Accelerator().process_index}.yaml", training={"max_steps": 2})
    status = main(["compare", str(recipe), "--strategies", "none,dissect", "--output-dir", str(place / "compared")])
    sys.exit(status)
