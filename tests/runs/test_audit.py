"""Whole audits by a small trained model: what is found, what is written, and what is said when something is wrong."""

import math
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from testing import tiny_models
from testing.tar_files import write_tar
from testing.tiny_recipe import tiny_recipe

from hf_dissect import DissectTrainer, DissectTrainingArguments, SampleLedger, load_model_and_processor, make_scenes
from hf_dissect.auditing.ledger_columns import open_ledger, read_ledger_columns
from hf_dissect.cli import main
from hf_dissect.data import shuffle_captions
from hf_dissect.evaluation import noise_detection_metrics
from hf_dissect.runs.audit import audit
from hf_dissect.runs.run import run_recipe

COLUMNS = [
    "rank",
    "sample_id",
    "row",
    "place",
    "caption",
    "correlation",
    "score",
    "p_mismatched",
    "local_fdr",
    "is_clean",
]


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


def test_the_table_has_all_pairs_the_most_suspicious_first(run, tmp_path):
    rows = shuffle_captions(make_scenes(256, seed=5), rate=0.1)
    rows.to_parquet(tmp_path / "x.parquet")
    result = audit(str(run), data=str(tmp_path / "x.parquet"), output_dir=tmp_path / "audit")
    table = pq.read_table(tmp_path / "audit" / "scores.parquet")
    assert table.equals(result.table) and result.num_trained == 0
    assert table.column_names[:10] == COLUMNS and table.column_names[-1] == "problem"
    assert table["rank"].to_pylist() == list(range(1, 257)) and sorted(table["row"].to_pylist()) == list(range(256))
    for column in ("p_mismatched", "local_fdr"):
        assert (np.diff(table[column].to_numpy()) <= 0).all()
    assert (np.diff(table["score"].to_numpy()) >= 0).all()
    assert table["caption"].to_pylist() == [rows["caption"][row] for row in table["row"].to_pylist()]
    assert table["is_clean"].to_pylist() == [rows["clean"][row] for row in table["row"].to_pylist()]
    assert table["problem"].null_count == 256


def test_nothing_is_estimated_of_pairs_that_the_run_trained_on(run, audited):
    result, folder = audited
    assert result.num_trained == 256 and result.mismatched_share is result.interval is result.separation is None
    table = result.table
    assert table["trained_on"].to_pylist() == [True] * 256
    assert table["p_mismatched"].null_count == table["local_fdr"].null_count == 256
    # The warm-up took one epoch, so that its history is from before training; the pairs are ranked by it.
    history = open_ledger(run).read("history", torch.tensor(table["sample_id"].to_pylist())).numpy()
    assert (np.diff(history) >= 0).all()
    np.testing.assert_array_equal(table["earlier_correlation"].to_numpy(), history)
    page = (folder / "audit.html").read_text()
    assert "not known: the model trained on these pairs" in page and "hf-dissect audit --fit" in page


@pytest.mark.parametrize("change", ["same rows", "rows in another order", "part of them", "other captions", "by key"])
def test_pairs_of_the_run_are_recognised_wherever_they_come_from(run, tmp_path, change):
    rows = shuffle_captions(make_scenes(256), rate=0.1).remove_columns("clean")
    new = make_scenes(60, seed=9)
    if change == "rows in another order":
        rows = rows.shuffle(seed=1)
    elif change == "part of them":
        rows = datasets.concatenate_datasets([rows.select(range(40)), new.cast(rows.features)])
    elif change == "other captions":
        rows = make_scenes(256)
    given = {}
    if change == "by key":
        rows, given = rows.add_column("name", [f"k{place}" for place in range(256)]), {"id_column": "name"}
    rows.to_parquet(tmp_path / "x.parquet")
    result = audit(str(run), data=str(tmp_path / "x.parquet"), output_dir=tmp_path / "a", **given)
    if change == "part of them":
        assert result.num_trained == 40 and result.separation is not None
        trained = [(row["row"] < 40, row["p_mismatched"] is None) for row in result.table.to_pylist()]
        assert all(is_old == is_unknown for is_old, is_unknown in trained)
    else:
        assert result.num_trained == 256 and result.mismatched_share is None


def test_pairs_are_recognised_by_the_ledger_alone_where_the_training_data_are_gone(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    recipe = yaml.safe_load((copy / "recipe.yaml").read_text())
    recipe["data"] |= {"source": "folder", "path": "/gone/away"}
    (copy / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    shuffle_captions(make_scenes(256), rate=0.1).to_parquet(tmp_path / "same.parquet")
    shuffle_captions(make_scenes(256, seed=4), rate=0.1).to_parquet(tmp_path / "new.parquet")
    counts = {
        name: audit(str(copy), data=str(tmp_path / f"{name}.parquet"), output_dir=tmp_path / name).num_trained
        for name in ("same", "new")
    }
    assert counts == {"same": 256, "new": 0}


def test_an_export_of_learnt_or_inseparable_pairs_is_refused_unless_forced(run, tmp_path):
    shuffle_captions(make_scenes(80, seed=7), rate=0.5).to_parquet(tmp_path / "x.parquet")
    given = {"output_dir": tmp_path / "a", "export_to": tmp_path / "clean"}
    with pytest.raises(ValueError, match="the model trained on 256 of these pairs.*--export-anyway"):
        audit(str(run), **given)
    assert (tmp_path / "a" / "scores.parquet").is_file() and not (tmp_path / "clean").exists()
    with pytest.raises(ValueError, match="with an AUROC of 0.* only .at least 0.8.*--export-anyway"):
        audit(str(run), data=str(tmp_path / "x.parquet"), **given)
    with pytest.raises(ValueError, match="have no p_mismatched to choose by; give --keep"):
        audit(str(run), **given, export_anyway=True)
    assert not (tmp_path / "clean").exists()
    result = audit(str(run), **given, export_anyway=True, keep=0.25)
    assert result.export.pairs_after == 64
    best = sorted(result.table["row"].to_pylist()[192:])
    kept = datasets.load_dataset(str(tmp_path / "clean"), split="train")
    assert list(kept["caption"]) == [shuffle_captions(make_scenes(256), rate=0.1)["caption"][row] for row in best]


def test_the_table_leads_back_to_the_data_of_the_user(run, tmp_path):
    rows = make_scenes(20, seed=3)
    (tmp_path / "pictures" / "sub").mkdir(parents=True)
    names = [f"sub/{place}.png" for place in range(20)]
    for name, picture in zip(names, rows["image"], strict=True):
        (tmp_path / "pictures" / name).write_bytes(picture["bytes"])
    table = {"file_name": names, "caption": rows["caption"], "photo": [f"p{place}" for place in range(20)]}
    datasets.Dataset.from_dict(table).to_csv(tmp_path / "pictures" / "metadata.csv")
    result = audit(str(run), data=str(tmp_path / "pictures"), output_dir=tmp_path / "a", id_column="photo")
    for row in result.table.to_pylist():
        assert row["file_name"].endswith(names[row["row"]]) and row["id"] == f"p{row['row']}"
        assert row["caption"] == rows["caption"][row["row"]]
    tars = tmp_path / "tars"
    tars.mkdir()
    for shard in range(2):
        members = {}
        for place in range(10 * shard, 10 * shard + 10):
            members[f"s{place:03}.png"] = (tmp_path / "pictures" / names[place]).read_bytes()
            members[f"s{place:03}.txt"] = rows["caption"][place].encode()
        write_tar(tars / f"{shard}.tar", members)
    result = audit(str(run), data=str(tars), output_dir=tmp_path / "b")
    assert {row["key"]: row["caption"] for row in result.table.to_pylist()} == {
        f"s{place:03}": caption for place, caption in enumerate(rows["caption"])
    }


def test_a_text_column_called_clean_does_no_harm(run, tmp_path):
    rows = make_scenes(30, seed=3)
    rows = rows.add_column("clean", [f"cleaned {place}" for place in range(30)])
    rows.to_parquet(tmp_path / "x.parquet")
    result = audit(str(run), data=str(tmp_path / "x.parquet"), output_dir=tmp_path / "a")
    assert result.auroc is None and "is_clean" not in result.table.column_names


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
        threshold=0.5,
        export_anyway=True,
    )
    is_clean = torch.tensor(result.table["is_clean"].to_pylist())
    auroc = noise_detection_metrics(torch.tensor(result.table["score"].to_pylist()), is_clean)["auroc"]
    assert result.auroc == pytest.approx(auroc, abs=1e-6) and auroc > 0.9
    # With five seeds of model, pairs and noise: 0.78 to 0.97, share 0.22 to 0.27, 25 to 29 dropped, 93 to 97 % clean.
    # The bounds are as wide as 128 pairs, of which 32 are mismatched, make them.
    assert (~is_clean[:32]).float().mean() > 0.75
    assert result.mismatched_share == pytest.approx(0.25, abs=0.06)
    likely = (result.table["p_mismatched"].to_numpy() > 0.5).sum()
    kept = pq.read_table(tmp_path / "clean")
    assert 20 < likely == 128 - kept.num_rows < 36 and np.mean(kept["clean"].to_pylist()) > 0.9


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


def earlier_by_hand(file: Path, ids: list[int]) -> list[float]:
    """The last correlation of each pair up to the step that first trained on it, relative to those of its epoch."""
    rows = pq.read_table(file).to_pylist()
    earlier = []
    for sample_id in ids:
        own = sorted((row for row in rows if row["sample_id"] == sample_id), key=lambda row: row["step"])
        trained = next((row["step"] for row in own if row["kept"]), float("inf"))
        last = [row for row in own if row["step"] <= trained][-1]
        of_epoch = np.array([row["correlation"] for row in rows if row["epoch"] == last["epoch"]])
        earlier.append((last["correlation"] - of_epoch.mean()) / of_epoch.std())
    return earlier


@pytest.mark.parametrize(
    "selection", [{"strategy": "none"}, {"strategy": "small_loss"}, {"strategy": "dissect", "warmup_epochs": 2}]
)
def test_pairs_of_the_run_are_ranked_by_the_record_of_its_selections(selection, tmp_path):
    recipe = tiny_recipe(
        tmp_path / "run",
        selection={**selection, "record": True},
        training={"save_strategy": "steps", "save_steps": 5, "num_train_epochs": 3},
    )
    run_recipe(recipe)
    record = tmp_path / "run" / "selection.parquet"
    for folder in ("run", "run/checkpoint-5"):
        result = audit(str(tmp_path / folder), output_dir=tmp_path / "audit")
        table = result.table
        ids = table["sample_id"].to_pylist()
        expected = earlier_by_hand(record, ids)
        np.testing.assert_allclose(table["earlier_correlation"].to_numpy(), expected, atol=1e-5)
        assert sorted(ids) == list(range(64)) and expected == sorted(expected)
        assert result.origin_of_ranks == "last correlation before training, from selection.parquet"
        assert result.num_trained == 64 and result.mismatched_share is None
        # Many correlations are 0 at first, so that the order of these pairs must not count.
        auroc = noise_detection_metrics(torch.tensor(expected), torch.tensor(table["is_clean"].to_pylist()))["auroc"]
        assert result.auroc == pytest.approx(auroc, abs=1e-6)


def test_a_record_that_is_not_whole_is_left_out(tmp_path, caplog):
    run_recipe(tiny_recipe(tmp_path / "run", selection={"strategy": "none", "record": True}))
    record = tmp_path / "run" / "selection.parquet"
    record.write_bytes(record.read_bytes()[:200])
    result = audit(str(tmp_path / "run"), output_dir=tmp_path / "audit")
    assert result.origin_of_ranks is None and result.num_trained == 64
    assert "selection.parquet is left out, because it cannot be read" in caplog.text


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


def test_the_evidence_of_a_run_becomes_the_probability_of_a_match(tmp_path):
    ledger = SampleLedger(None, columns=("correlation", "evidence"))
    evidence = torch.tensor([4.0, 3.0, -5.0, -4.0])
    ledger.write("evidence", torch.tensor([11, 12, 13, 14]), evidence)
    ledger.save(tmp_path / "ledger.safetensors")
    ids = torch.tensor([14, 99, 12, 11, 13])
    columns = read_ledger_columns(open_ledger(tmp_path), ids, torch.zeros(5), by_row=False)
    assert set(columns) == {"ledger_evidence", "ledger_match"}
    pi = 0.5
    for _ in range(1000):  # the share of the largest likelihood
        pi = sum(pi * math.exp(s) / (pi * math.exp(s) + 1 - pi) for s in evidence.tolist()) / 4
    expected = [pi * math.exp(s) / (pi * math.exp(s) + 1 - pi) for s in (-4.0, 3.0, 4.0, -5.0)]
    found = columns["ledger_match"].tolist()
    assert math.isnan(found.pop(1)) and found == pytest.approx(expected, abs=1e-4)


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
        export_anyway=True,
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
    shuffle_captions(make_scenes(60, seed=8), rate=0.3).to_parquet("pairs.parquet")
    command = ["audit", str(run), "--data", "pairs.parquet", "--export-clean", "clean", "--keep", "0.8"]
    assert main(command) == 2
    assert "--export-anyway" in capsys.readouterr().err
    assert main([*command, "--export-anyway", "--output-dir", "audit"]) == 0
    said = capsys.readouterr().out
    assert (
        "60 pairs, share of mismatched ones " in said
        and "AUROC of the ranking" in said
        and "page    audit-2/audit.html" in said
    )
    assert "12 of 60 pairs dropped, 48 of 60 rows kept" in said and pq.read_table("clean").num_rows == 48


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep", "0.8"], "name a folder with --export-clean as well"),
        (["--export-clean", "x", "--keep", "0.8", "--threshold", "0.5"], "give one of them"),
        (["--export-clean", "x", "--keep", "1.5"], "above 0 and at most 1"),
        (["--export-clean", "x", "--threshold", "-1"], "a probability, from 0 to 1"),
        (["--export-clean", "x", "--max-fdr", "0"], "between 0 and 1"),
        (["--export-clean", "x", "--max-fdr", "0.1", "--keep", "0.8"], "--keep and --max-fdr both choose"),
        (["--export-anyway"], "name a folder with --export-clean as well"),
        (["--folds", "3"], "not a setting of an audit by a checkpoint"),
        (["--fit", "x.parquet"], "audits without a checkpoint"),
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
