"""Whole audits by a small trained model: what is found, what is written, and what is said when something is wrong."""

import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from testing import tiny_models
from testing.tiny_recipe import tiny_recipe

from hf_dissect import DissectTrainer, DissectTrainingArguments, SampleLedger, load_model_and_processor, make_scenes
from hf_dissect.auditing.ledger_columns import open_ledger, read_ledger_columns
from hf_dissect.cli import main
from hf_dissect.data import shuffle_captions
from hf_dissect.evaluation import noise_detection_metrics
from hf_dissect.runs.audit import audit
from hf_dissect.runs.run import run_recipe

COLUMNS = ["rank", "sample_id", "row", "place", "caption", "correlation", "score", "p_mismatched", "is_clean"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run with a history of its 256 pairs."""
    folder = tmp_path_factory.mktemp("run")
    recipe = tiny_recipe(
        folder,
        data={"scenes_train": 256, "noise_rate": 0.1},
        selection={"strategy": "dissect", "warmup_epochs": 1},
        training={"num_train_epochs": 2, "per_device_train_batch_size": 64},
    )
    run_recipe(recipe)
    return folder


@pytest.fixture(scope="module")
def audited(run, tmp_path_factory):
    """The audit of the run's own pairs, and the folder it was written to."""
    folder = tmp_path_factory.mktemp("audited") / "audit"
    return audit(str(run), output_dir=folder), folder


def test_the_table_has_all_pairs_the_most_suspicious_first(audited):
    result, folder = audited
    table = pq.read_table(folder / "scores.parquet")
    assert table.equals(result.table)
    assert table.column_names[:9] == COLUMNS and table.column_names[-1] == "problem"
    assert table["rank"].to_pylist() == list(range(1, 257)) and sorted(table["row"].to_pylist()) == list(range(256))
    score = table["score"].to_numpy()
    assert (np.diff(score) >= 0).all() and (np.diff(table["p_mismatched"].to_numpy()) <= 0).all()
    rows = shuffle_captions(make_scenes(256), rate=0.1)
    assert table["caption"].to_pylist() == [rows["caption"][row] for row in table["row"].to_pylist()]
    assert table["is_clean"].to_pylist() == [rows["clean"][row] for row in table["row"].to_pylist()]
    assert table["problem"].null_count == 256


def test_mismatched_pairs_stand_first(tmp_path):
    model, processor = tiny_models.tiny_clip()
    settings = {"per_device_train_batch_size": 32, "max_steps": 40, "learning_rate": 3e-3, "use_cpu": True}
    settings |= {"selection_strategy": "none", "save_run_folder": False, "save_strategy": "no", "report_to": "none"}
    trainer = DissectTrainer(
        model=model,
        processing_class=processor,
        train_dataset=tiny_models.tiny_pairs(128),
        args=DissectTrainingArguments(str(tmp_path / "run"), **settings),
    )
    trainer.train()
    trainer.save_model(tmp_path / "model")
    shuffle_captions(tiny_models.tiny_pairs(128, seed=1), rate=0.25).to_parquet(tmp_path / "x.parquet")
    result = audit(
        str(tmp_path / "model"),
        data=str(tmp_path / "x.parquet"),
        output_dir=tmp_path / "audit",
        export_to=tmp_path / "clean",
        threshold=0.9,
    )
    is_clean = torch.tensor(result.table["is_clean"].to_pylist())
    auroc = noise_detection_metrics(torch.tensor(result.table["score"].to_pylist()), is_clean)["auroc"]
    assert result.auroc == pytest.approx(auroc, abs=1e-6) and auroc > 0.9
    assert (~is_clean[:32]).float().mean() > 0.75
    assert result.mismatched_share == pytest.approx(0.25, abs=0.12)
    likely = (result.table["p_mismatched"].to_numpy() > 0.9).sum()
    kept = pq.read_table(tmp_path / "clean")
    assert 0 < likely == 128 - kept.num_rows and np.mean(kept["clean"].to_pylist()) > 0.85


def test_the_ledger_of_the_run_is_added(run, audited):
    table = audited[0].table
    ledger = open_ledger(run)
    ids = torch.tensor(table["sample_id"].to_pylist())
    assert {"ledger_correlation", "ledger_history", "ledger_differential"} <= set(table.column_names)
    history = ledger.read("history", ids).numpy()
    np.testing.assert_array_equal(table["ledger_history"].to_numpy(), history)
    np.testing.assert_allclose(
        table["ledger_differential"].to_numpy(), history - table["correlation"].to_numpy(), atol=1e-4
    )


def test_other_data_get_a_ledger_only_when_it_is_named_and_fits(run, tmp_path):
    make_scenes(256).to_parquet(tmp_path / "same.parquet")
    make_scenes(40).to_parquet(tmp_path / "other.parquet")
    given = {"data": str(tmp_path / "same.parquet"), "output_dir": tmp_path / "a"}
    assert "ledger_history" not in audit(str(run), **given).table.column_names
    assert "ledger_history" in audit(str(run), **given, ledger=run).table.column_names
    assert sorted(path.name for path in tmp_path.glob("a*")) == ["a", "a-2"]
    with pytest.raises(ValueError, match="the row numbers of 256 pairs, the data the row numbers of 40 pairs"):
        audit(str(run), data=str(tmp_path / "other.parquet"), ledger=run, output_dir=tmp_path / "b")
    with pytest.raises(FileNotFoundError, match="No ledger at"):
        audit(str(run), ledger=tmp_path, output_dir=tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_labels_of_hashed_ids(tmp_path):
    ledger = SampleLedger(columns=("correlation", "agreement", "y_cm", "y_im"))
    for name, values in {"correlation": [1.0, 2.0], "y_cm": [0.9, 0.2], "y_im": [0.5, 0.7]}.items():
        ledger.write(name, torch.tensor([70, 80]), torch.tensor(values))
    ledger.save(tmp_path / "ledger.safetensors")
    ids, correlation = torch.tensor([80, 5, 70]), torch.zeros(3)
    columns = read_ledger_columns(open_ledger(tmp_path), ids, correlation, by_row=False)
    assert set(columns) == {"ledger_correlation", "ledger_y_cm", "ledger_y_im", "ledger_label"}
    torch.testing.assert_close(columns["ledger_label"], torch.tensor([0.2, torch.nan, 0.5]), equal_nan=True)
    with pytest.raises(ValueError, match="None of the pairs is in the ledger"):
        read_ledger_columns(open_ledger(tmp_path), torch.tensor([1]), torch.zeros(1), by_row=False)
    with pytest.raises(ValueError, match="arbitrary ids, the data the row numbers of 1 pairs"):
        read_ledger_columns(open_ledger(tmp_path), torch.tensor([70]), torch.zeros(1), by_row=True)


def test_unreadable_rows_are_listed_and_not_exported(run, tmp_path):
    rows = make_scenes(40)
    broken = [
        {**row, "image": {"bytes": b"no picture", "path": None}} if at == 7 else row for at, row in enumerate(rows)
    ]
    broken[9]["caption"] = " "
    datasets.Dataset.from_list(broken, features=rows.features).to_parquet(tmp_path / "x.parquet")
    result = audit(
        str(run),
        data=str(tmp_path / "x.parquet"),
        output_dir=tmp_path / "audit",
        export_to=tmp_path / "clean",
        keep=0.5,
    )
    assert sorted(result.bad_rows.reasons) == [7, 9]
    last = result.table.slice(38).to_pylist()
    assert [(row["row"], row["rank"], row["score"]) for row in last] == [(7, None, None), (9, None, None)]
    problem = "UnidentifiedImageError: not a picture, the file holds b'no picture'"
    assert [row["problem"] for row in last] == [
        f"image missing or undecodable: {problem}",
        "caption missing or empty",
    ]
    assert "Unreadable pairs (2)" in (tmp_path / "audit" / "audit.html").read_text()
    assert result.export.pairs_after == 19
    kept = datasets.load_dataset(str(tmp_path / "clean"), split="train")
    best = result.table.slice(19, 19)["row"].to_pylist()
    assert list(kept["caption"]) == [rows["caption"][row] for row in sorted(best)]


def test_several_captions_a_picture(run, tmp_path):
    make_scenes(30, captions_per_image=3).to_parquet(tmp_path / "x.parquet")
    result = audit(str(run), data=str(tmp_path / "x.parquet"), output_dir=tmp_path / "audit", max_page_pairs=20)
    captions = datasets.Dataset.from_parquet(str(tmp_path / "x.parquet"))["captions"]
    for row in result.table.to_pylist():
        assert (
            row["caption"] == captions[row["row"]][row["place"]] and row["sample_id"] == 3 * row["row"] + row["place"]
        )
    shown = set(result.table["row"].to_pylist()[:20])
    pictures = {int(path.stem) for path in (tmp_path / "audit" / "thumbnails").rglob("*.jpg")}
    assert (
        pictures == shown
        and "The 20 most suspicious pairs are shown" in (tmp_path / "audit" / "audit.html").read_text()
    )


def test_a_model_of_stored_features_needs_no_pictures(tmp_path):
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model, processor = load_model_and_processor(
        config={
            "model_type": "vision-text-dual-encoder",
            "projection_dim": 8,
            "vision_config": {"model_type": "precomputed_features", "hidden_size": 6},
            "text_config": {"model_type": "bert", **tower, "max_position_embeddings": 16},
        },
        captions=make_scenes(64)["caption"],
        vocab_size=600,
    )
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    vectors = np.random.default_rng(0).normal(size=(12, 6)).tolist()
    datasets.Dataset.from_dict({"image_features": vectors, "caption": make_scenes(12)["caption"]}).to_parquet(
        tmp_path / "x.parquet"
    )
    folder = tmp_path / "audit"
    result = audit(str(tmp_path / "model"), data=str(tmp_path / "x.parquet"), output_dir=folder)
    assert len(result.table) == 12 and result.auroc is None and "is_clean" not in result.table.column_names
    assert sorted(path.name for path in folder.iterdir()) == ["audit.html", "scores.parquet"]
    page = (folder / "audit.html").read_text()
    assert '"unpictured":null' in page and str(tmp_path) not in page


def test_the_command_reports_its_findings(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shuffle_captions(make_scenes(60), rate=0.3).to_parquet("pairs.parquet")
    assert main(["audit", str(run), "--data", "pairs.parquet", "--export-clean", "clean", "--keep", "0.8"]) == 0
    said = capsys.readouterr().out
    assert "60 pairs, about " in said and "AUROC of the score" in said and "page    audit/audit.html" in said
    assert "12 of 60 pairs dropped, 48 of 60 rows kept" in said and pq.read_table("clean").num_rows == 48


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep", "0.8"], "name a folder with --export-clean as well"),
        (["--export-clean", "x", "--keep", "0.8", "--threshold", "0.5"], "give one of them"),
        (["--export-clean", "x", "--keep", "1.5"], "above 0 and at most 1"),
        (["--export-clean", "x", "--threshold", "-1"], "a probability, from 0 to 1"),
        (["--split", "dev"], "split 'dev': the data have train, validation, test"),
        (["--data", "nowhere.parquet", "--export-clean", "."], "is not empty"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(run, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert main(["audit", str(run), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "audit").exists()


def test_help_needs_neither_torch_nor_transformers():
    code = "import sys; from hf_dissect.cli import main\ntry: main(['audit', '--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "examples:" in done.stdout and "--export-clean FOLDER" in done.stdout
