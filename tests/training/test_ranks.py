"""What processes tell each other: nothing when alone, and the truth when there are two."""

import json
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from testing import two_ranks
from testing.launched import on_ranks

from hf_dissect.distributed import Ranks


def test_alone_everything_stays_as_it_is():
    ranks = Ranks(Accelerator(cpu=True))
    assert ranks.alone and ranks.gather_numbers(3, 5).tolist() == [[3, 5]] and ranks.gather_objects("a") == ["a"]
    values = torch.tensor([3.0, 1.0])
    assert torch.equal(ranks.gather(values), values) and torch.equal(ranks.gather_rows(values, [2]), values)
    assert torch.equal(ranks.gather_columns({"a": values}, [2])["a"], values)


def one_process_runs(folder: Path) -> None:
    """What the two processes are compared with, and a checkpoint that they go on from."""
    for strategy, options in two_ranks.GLOBAL_RUNS.items():
        two_ranks.global_trainer(folder / "alone" / strategy, options, strategy=strategy, batch_size=16).train()
    trainer = two_ranks.global_trainer(
        folder / "one-process", {"variant": "momentum"}, strategy="dissect", batch_size=16
    )
    trainer.args.max_steps, trainer.args.num_train_epochs = -1, 3
    trainer.args.save_strategy, trainer.args.save_steps = "steps", 6
    trainer.train()
    for dual in (False, True):
        place = folder / "alone" / "labels" / f"dual-{dual}"
        trainer = two_ranks.soft_label_trainer(place, batch_size=16, dual=dual)
        trainer.train()
        trainer.ledger.save(place / "ledger.safetensors")


def check_global_scope(folder: Path) -> None:
    """Two processes kept, step by step, what one process kept of the union of their candidates."""
    for strategy in two_ranks.GLOBAL_RUNS:
        alone, together = (
            pq.read_table(folder / way / strategy / "selection.parquet").to_pandas() for way in ("alone", "global")
        )
        assert len(together) > 9 * 15 and together.sample_id.tolist() == alone.sample_id.tolist()
        for step, rows in alone[alone.kept].groupby("step"):
            kept = together[together.kept & (together.step == step)].sample_id
            # With the bad row, half of 15 is shared out: a pair fewer than one process keeps.
            assert set(kept) <= set(rows.sample_id) and len(kept) >= len(rows) - 1
            assert len(kept) == 8 or len(alone[alone.step == step]) == 15


def check_soft_labels(folder: Path) -> None:
    """The evidence and the labels are those of one process, whose batch is that of both."""
    for dual in (False, True):
        alone = load_file(folder / "alone" / "labels" / f"dual-{dual}" / "ledger.safetensors")
        assert alone["column.y_cm_2" if dual else "column.y_cm"].unique().numel() > 50
        for rank in range(2):
            together = load_file(folder / "labels" / f"dual-{dual}" / f"ledger-{rank}.safetensors")
            torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_two_processes_train_compare_and_agree(tmp_path):
    """Train a dozen times in two processes, and as often in one."""
    one_process_runs(tmp_path)
    on_ranks([2], tmp_path, partial(two_ranks.check_all, tmp_path))
    # One comparison in one folder, told and written once.
    lines = [line for rank in range(2) for line in (tmp_path / f"printed-{rank}.txt").read_text().splitlines()]
    assert [line for line in lines if line.startswith("[")] == ["[1/2] none", "[2/2] dissect"]
    assert len([line for line in lines if line.startswith("report ")]) == 1
    # Where the processes met is removed by torch, or left, as it happens.
    assert {path.name for path in tmp_path.iterdir()} - {"store-2"} == {
        *("trainer", "router", "grad", "global", "labels", "alone", "evaluation", "stream", "one-process"),
        *("compared", "tiny-0.yaml", "tiny-1.yaml", "printed-0.txt", "printed-1.txt", "result-2.pt"),
    }
    check_global_scope(tmp_path)
    check_soft_labels(tmp_path)
    metrics = json.loads((tmp_path / "compared" / "metrics.json").read_text())
    assert [run["steps"] for run in metrics["runs"]] == [2, 2] and len(metrics["table"]) == 2
    alone = json.loads((tmp_path / "trainer" / "metrics.json").read_text())
    assert (
        alone["steps"] == 12 and alone["bad_rows"]["ids"] == [7] and (tmp_path / "trainer" / "report.html").is_file()
    )
