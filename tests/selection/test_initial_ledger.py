"""A run that begins with the scores of another selects by them from its first step on, if they are of its pairs."""

import json
import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from testing.tiny_recipe import tiny_recipe, tiny_settings

from hf_dissect import DissectTrainingArguments
from hf_dissect.cli import main
from hf_dissect.recipe.recipe import Recipe, RecipeError
from hf_dissect.runs.run import build_trainer, run_recipe
from hf_dissect.selection import SampleLedger
from hf_dissect.selection.initial_ledger import check_same_pairs, fill_ledger
from hf_dissect.selection.ledger import SavedLedger, read_ledger
from hf_dissect.selection.ledger_files import read_scores, write_tables


def scores_of(**columns: list[float]) -> SavedLedger:
    """Scores of pairs that are known by row numbers."""
    values = {name: torch.tensor(column) for name, column in columns.items()}
    count = len(next(iter(values.values())))
    return SavedLedger(count, torch.arange(count), values, {})


@pytest.fixture
def saved(tmp_path) -> Path:
    """A folder with a ledger of 64 pairs: the history of the first half is high, that of the second half low."""
    ledger = SampleLedger(64, ("correlation", "history"))
    ledger.write("history", torch.arange(64), torch.tensor([100.0] * 32 + [0.0] * 32))
    (tmp_path / "first").mkdir()
    ledger.save(tmp_path / "first" / "ledger.safetensors")
    return tmp_path / "first"


def recipe_beginning_with(folder: Path, source: Path | str, **sections):
    selection = {"ledger": str(source), "warmup_epochs": 0, "record": True, **sections.pop("selection", {})}
    return tiny_recipe(folder, selection=selection, evaluation={"noise_detection": False}, **sections)


def test_the_first_step_selects_by_the_given_history(saved, tmp_path):
    run_recipe(recipe_beginning_with(tmp_path / "second", saved))
    rows = pq.read_table(tmp_path / "second" / "selection.parquet").to_pandas()
    first_epoch = rows[rows.epoch == 0]
    for _, batch in first_epoch.groupby("step"):
        # What fell from 100 comes before what rose from 0.
        high = set(batch.sample_id[batch.sample_id < 32])
        kept = set(batch.sample_id[batch.kept])
        assert len(kept) == 8 and (high <= kept or kept <= high)
    assert torch.equal(
        read_ledger(tmp_path / "second" / "ledger.safetensors").columns["history"],
        read_ledger(saved / "ledger.safetensors").columns["history"],
    )


def test_the_scores_of_another_rule_stand_in_for_a_history():
    ledger = SampleLedger(3, ("correlation", "history"))
    assert fill_ledger(ledger, scores_of(correlation=[1.0, 2.0, 3.0]), {"history": "correlation"}) == [
        "correlation",
        "history",
    ]
    assert ledger.column("history").tolist() == [1.0, 2.0, 3.0]
    other = SampleLedger(3, ("correlation", "history"))
    fill_ledger(other, scores_of(correlation=[1.0, 2.0, 3.0], history=[4.0, 5.0, 6.0]), {"history": "correlation"})
    assert other.column("history").tolist() == [4.0, 5.0, 6.0]


def test_a_resumed_run_keeps_its_own_ledger(saved, tmp_path):
    recipe = recipe_beginning_with(tmp_path / "second", saved, training={"save_strategy": "epoch"})
    run_recipe(recipe)
    (saved / "ledger.safetensors").unlink()  # it is not even looked for
    before = read_ledger(tmp_path / "second" / "ledger.safetensors").columns
    (tmp_path / "second" / "checkpoint-8" / "trainer_state.json").unlink()
    run_recipe(recipe, resume=True)
    after = read_ledger(tmp_path / "second" / "ledger.safetensors").columns
    assert all(torch.equal(after[name], before[name]) for name in ("correlation", "history"))


def test_a_checkpoint_a_file_and_a_folder_of_tables_are_read_alike(saved, tmp_path):
    ledger = read_ledger(saved / "ledger.safetensors")
    (table,) = write_tables(ledger, tmp_path / "tables" / "data")
    for source in (saved, saved / "ledger.safetensors", tmp_path / "tables", tmp_path / "tables/data", table):
        scores = read_scores(str(source))
        assert scores.num_samples == 64 and torch.equal(scores.columns["history"], ledger.columns["history"])


def test_tables_of_keys_keep_their_ids(tmp_path):
    ledger = SampleLedger(None, ("correlation",))
    ids = torch.tensor([2**62, 5, 7])
    ledger.write("correlation", ids, torch.tensor([1.0, 2.0, torch.nan]))
    ledger.save(tmp_path / "ledger.safetensors")
    write_tables(read_ledger(tmp_path / "ledger.safetensors"), tmp_path / "tables")
    scores = read_scores(str(tmp_path / "tables"))
    assert scores.num_samples is None and scores.ids.tolist() == [5, 2**62]
    assert scores.columns["correlation"].tolist() == [2.0, 1.0]


# ---- what does not fit ----


def test_scores_of_another_number_of_pairs(saved, tmp_path, capsys):
    Path(tmp_path / "tiny.yaml").write_text(json.dumps(tiny_settings()))
    command = ["train", str(tmp_path / "tiny.yaml"), f"selection.ledger={saved}", "selection.warmup_epochs=0"]
    assert main([*command, "data.scenes_train=48", "--output-dir", str(tmp_path / "out")]) == 2
    assert "is of 64 pairs, the training data are 48" in capsys.readouterr().err


def test_scores_that_know_pairs_otherwise_or_know_none_of_them(caplog):
    rows, keys = scores_of(correlation=[1.0] * 3), SavedLedger(None, torch.tensor([3, 4]), {}, {})
    with pytest.raises(ValueError, match=r"knows pairs by keys \(data.id_column\), this run by row numbers"):
        check_same_pairs("x", keys, SampleLedger(3))
    with pytest.raises(ValueError, match="knows pairs by row numbers, this run by keys"):
        check_same_pairs("x", rows, SampleLedger())
    with pytest.raises(ValueError, match="knows none of the 2 training pairs"):
        check_same_pairs("x", keys, SampleLedger(), torch.tensor([8, 9]))
    check_same_pairs("x", keys, SampleLedger(), torch.tensor([3, 9, 10]))
    assert "only 33 % of the training pairs have scores in x" in caplog.text


def test_scores_of_other_columns_only(tmp_path):
    ledger = SampleLedger(64, ("loss",))
    ledger.save(tmp_path / "ledger.safetensors")
    trainer = build_trainer(recipe_beginning_with(tmp_path / "second", tmp_path))
    with pytest.raises(ValueError, match=r"has the columns loss, and this run keeps none of them"):
        trainer.train()


def test_what_is_no_ledger(tmp_path):
    with pytest.raises(FileNotFoundError, match="found neither ledger.safetensors nor a Parquet file of scores"):
        read_scores(str(tmp_path))
    pq.write_table(pa.table({"sample_id": [1]}), tmp_path / "foreign.parquet")
    with pytest.raises(ValueError, match="foreign.parquet holds no scores as hf-dissect push-ledger writes them"):
        read_scores(str(tmp_path))


@pytest.mark.parametrize("ids", [[0, 0], [0, -1], [0, 2]])
def test_impossible_ids(tmp_path, ids):
    header = {b"hf_dissect.ledger": json.dumps({"num_samples": 2, "columns": ["correlation"]})}
    table = pa.table({"sample_id": ids, "correlation": pa.array([1.0, 2.0], pa.float32())})
    pq.write_table(table.replace_schema_metadata(header), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="its ids are repeated, negative or too large"):
        read_scores(str(tmp_path))


def test_no_warm_up_needs_a_ledger(tmp_path):
    with pytest.raises(RecipeError, match="0 leaves no history to select by; .*or selection.ledger"):
        Recipe.from_dict(tiny_settings(selection={"warmup_epochs": 0}))
    with pytest.raises(ValueError, match="or the ledger of another run"):
        DissectTrainingArguments(str(tmp_path), selection_warmup_epochs=0)
    DissectTrainingArguments(str(tmp_path), selection_warmup_epochs=0, initial_ledger="x")


def test_a_warm_up_that_would_write_over_the_scores_is_told(saved, tmp_path, caplog):
    trainer = build_trainer(recipe_beginning_with(tmp_path / "second", saved, selection={"warmup_epochs": 1}))
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "the first 1 epochs warm up and overwrite what it brings" in caplog.text
