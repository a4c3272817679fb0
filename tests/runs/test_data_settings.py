"""Settings of named data: a table that only reads rightly with them, in each command, and what is refused."""

import shutil

import numpy as np
import pytest
from datasets import Dataset
from testing import tiny_models
from testing.feature_pairs import make_feature_pairs
from testing.tiny_modalities import tiny_columns, tiny_trainer
from testing.tiny_recipe import tiny_recipe

from hf_dissect import audit, audit_by_fit, evaluate_checkpoint, make_scenes
from hf_dissect.auditing.cross_fit import FitSettings
from hf_dissect.cli import main
from hf_dissect.recipe.recipe import RecipeError
from hf_dissect.runs.data_settings import parse_data_settings
from hf_dissect.runs.run import run_recipe

SETTINGS = ["data.separator=';'", "data.encoding=cp1252"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny CLIP, saved."""
    folder = tmp_path_factory.mktemp("model")
    for part in tiny_models.tiny_clip():
        part.save_pretrained(folder)
    return folder


@pytest.fixture
def odd(tmp_path, monkeypatch):
    """A table with semicolons, umlauts in cp1252 and pictures elsewhere, next to the same one as Parquet."""
    monkeypatch.chdir(tmp_path)
    rows = make_scenes(24, split="test")
    captions = [f"Übergröße, {caption}" for caption in rows["caption"]]
    (tmp_path / "pictures").mkdir()
    for place, picture in enumerate(rows["image"]):
        (tmp_path / "pictures" / f"{place}.png").write_bytes(picture["bytes"])
    lines = ["image;caption", *(f"{place}.png;{caption}" for place, caption in enumerate(captions))]
    (tmp_path / "odd.csv").write_bytes("\n".join(lines).encode("cp1252"))
    rows.remove_columns("caption").add_column("caption", captions).to_parquet("plain.parquet")
    return [*SETTINGS, "data.image_root=pictures"]


def test_evaluate_reads_the_same_from_an_odd_table(model, odd, capsys):
    given = {"separator": ";", "encoding": "cp1252", "image_root": "pictures"}
    expected = evaluate_checkpoint(str(model), data="plain.parquet")
    assert evaluate_checkpoint(str(model), data="odd.csv", data_settings=given) == pytest.approx(expected)
    with pytest.raises((ValueError, FileNotFoundError, RuntimeError)):
        evaluate_checkpoint(str(model), data="odd.csv")
    for words in (
        [str(model), "--data", "odd.csv", *odd],
        [str(model), *odd, "--data", "odd.csv"],
        [*odd[:0], "--data", "odd.csv", str(model), *odd, "--max-rows", "24"],
    ):
        assert main(["evaluate", *words]) == 0
        assert f"{expected['recall_sum']:.1f}" in capsys.readouterr().out


def test_audit_reads_the_same_from_an_odd_table(model, odd):
    assert main(["audit", str(model), "--data", "plain.parquet", "--output-dir", "a"]) == 0
    assert main(["audit", str(model), *odd, "--data", "odd.csv", "--output-dir", "b"]) == 0
    plain, read = (Dataset.from_parquet(f"{folder}/scores.parquet") for folder in ("a", "b"))
    assert read["caption"] == plain["caption"] and plain["caption"][0].startswith("Übergröße, ")
    np.testing.assert_allclose(read["score"], plain["score"], atol=1e-5)


def test_a_fitted_audit_takes_settings_where_a_checkpoint_would_stand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = make_feature_pairs(260)
    np.savez("features.npz", train=np.array(rows["image_features"], np.float32))
    lines = ["caption|name", *(f"{row['caption']} ß|{row['name']}" for row in rows)]
    (tmp_path / "train.csv").write_bytes("\n".join(lines).encode("latin-1"))
    settings = ["data.separator='|'", "data.encoding=latin-1"]
    command = ["audit", "--fit", "train.csv", "--image-features", "features.npz", "--output-dir"]
    assert main([*command, "a", *settings]) == 0
    assert (
        main(["audit", *settings, "--fit", "train.csv", "--image-features", "features.npz", "--id-column", "name"])
        == 0
    )
    assert all(caption.endswith(" ß") for caption in Dataset.from_parquet("a/scores.parquet")["caption"])
    result = audit_by_fit(
        "train.csv",
        image_features="features.npz",
        data_settings={"separator": "|", "encoding": "latin-1"},
        settings=FitSettings(models=1, epochs=1, width=8),
        output_dir="c",
    )
    assert len(result.table) == 260


def test_the_data_of_a_recipe_can_be_read_from_another_place(tmp_path):
    data = dict.fromkeys(("scenes_train", "scenes_validation", "scenes_test", "noise_rate"))
    for split in ("train", "test"):
        (tmp_path / "old").mkdir(exist_ok=True)
        make_scenes(24, split=split).to_parquet(tmp_path / "old" / f"{split}.parquet")
    data |= {"source": "folder", "path": str(tmp_path / "old"), "validation_split": None}
    metrics = run_recipe(tiny_recipe(tmp_path / "run", data=data, training={"max_steps": 1}))
    shutil.move(tmp_path / "old", tmp_path / "new")
    with pytest.raises(FileNotFoundError):
        evaluate_checkpoint(str(tmp_path / "run"))
    figures = evaluate_checkpoint(str(tmp_path / "run"), data_settings={"path": str(tmp_path / "new")})
    assert figures["recall_sum"] == pytest.approx(metrics["final"]["recall_sum"])
    result = audit(str(tmp_path / "run"), data_settings={"path": str(tmp_path / "new")}, output_dir=tmp_path / "a")
    assert result.num_trained == 24


def test_a_student_takes_them_as_well(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for part in tiny_models.tiny_clip():
        part.save_pretrained(tmp_path / "clip")
    (tmp_path / "data" / "pictures").mkdir(parents=True)
    for split in ("train", "test"):
        lines = ["image;caption;label"]
        for place, row in enumerate(make_scenes(16, split=split)):
            (tmp_path / "data" / "pictures" / f"{split}{place}.png").write_bytes(row["image"]["bytes"])
            lines.append(f"{split}{place}.png;{row['caption']};{('wren', 'größe')[place % 2]}")
        (tmp_path / "data" / f"{split}.csv").write_bytes("\n".join(lines).encode("cp1252"))
    clip = [f"student.name_or_path={tmp_path / 'clip'}", f"auxiliaries.caption.name_or_path={tmp_path / 'clip'}"]
    data = ["data.path=data", "data.validation_split=null", *SETTINGS, "data.image_root=data/pictures"]
    run = ["training.max_steps=1", "training.save_strategy=no", "training.eval_strategy=no", "training.use_cpu=true"]
    run += ["training.per_device_train_batch_size=8", "training.report_to=none"]
    assert main(["train", "amid-clip", *data, *clip, *run, "--output-dir", "run"]) == 0
    expected = evaluate_checkpoint("run")
    given = {"separator": ";", "encoding": "cp1252", "image_root": "data/pictures"}
    assert evaluate_checkpoint("run", data="data", data_settings=given) == pytest.approx(expected)
    (tmp_path / "data" / "pictures").rename("elsewhere")
    assert main(["evaluate", "run", "data.image_root=elsewhere"]) == 0
    for words, message in (
        (["data.label_column=kind"], "data.label_column: 'kind' has no effect here: use --label-column"),
        (["--data", "data", "data.caption_column=x"], "a student reads one column"),
        (["data.separator=ab"], "data.separator"),
    ):
        capsys.readouterr()
        assert main(["evaluate", "run", *words]) == 2
        assert message in capsys.readouterr().err


def test_a_file_of_arrays_has_nothing_to_set(tmp_path):
    tiny_trainer(tmp_path / "run", save_run_folder=True, max_steps=1).train()
    np.savez(tmp_path / "x.npz", **tiny_columns(8))
    assert evaluate_checkpoint(str(tmp_path / "run"), data=str(tmp_path / "x.npz"))["num_rows"] == 8
    with pytest.raises(RecipeError, match="data.separator: ';' has no effect on the arrays of .*x.npz"):
        evaluate_checkpoint(str(tmp_path / "run"), data=str(tmp_path / "x.npz"), data_settings={"separator": ";"})


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        ("evaluate", ["data.seperator=;"], "data.seperator: unknown key (value ';')"),
        ("evaluate", ["data.separator=;;"], "data.separator: ';;' is not allowed; allowed: one character"),
        ("evaluate", ["data.encoding=klingon"], "data.encoding: 'klingon' is not allowed; allowed: utf-8"),
        ("evaluate", ["training.seed=3"], "training.seed: not a setting of evaluate; allowed: settings of the data"),
        ("evaluate", ["data=3"], "data: 3 is not allowed; allowed: data.key=value"),
        ("evaluate", ["data.num_workers=3"], "data.num_workers: 3 has no effect here: use --num-workers"),
        ("evaluate", ["data.max_eval_rows=3"], "use --max-rows"),
        ("evaluate", ["data.noise_rate=0.3"], "the captions are evaluated as they are"),
        ("evaluate", ["data.path=other"], "the data are named already"),
        ("evaluate", ["data.image_column=a", "--image-column", "b"], "'a' and --image-column b are both set"),
        ("evaluate", ["data.skip_bad_shards=true"], "true is only for data.source webdataset, not folder"),
        ("evaluate", ["data.separator", "';'"], "data.separator: write data.separator=';'"),
        ("evaluate", ["--data.separator=;"], "data.separator: write data.separator=;"),
        (
            "evaluate",
            ["--separator", ";"],
            "settings are written without dashes, with their section: data.separator=;",
        ),
        (
            "audit",
            ["data.streaming=true"],
            "data.streaming: True has no effect here: an audit reads the rows more than once",
        ),
        ("audit", ["data.seperator=;"], "data.seperator: unknown key"),
        ("audit", ["selection.ratio=0.3"], "selection.ratio: not a setting of audit"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(command, words, message, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_scenes(20).to_parquet("x.parquet")
    assert main([command, str(model), "--data", "x.parquet", *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "audit").exists()


def test_names_of_files_are_not_taken_for_settings(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_scenes(20).to_parquet("data.parquet")
    assert main(["evaluate", "--data", "data.parquet", str(model), "--output", "figures.json"]) == 0
    assert main(["audit", "--data", "data.parquet", str(model)]) == 0
    with pytest.raises(SystemExit):
        main(["evaluate", str(model), "--batchsize", "3"])
    assert "unrecognized arguments: --batchsize 3" in capsys.readouterr().err


def test_values_are_yaml():
    words = ["data.separator=tab", "data.skip_bad_shards=true", "data.name=007", "data.encoding='utf-16'"]
    found = parse_data_settings(words, "evaluate")
    assert found == {"separator": "tab", "skip_bad_shards": True, "name": "007", "encoding": "utf-16"}
    assert parse_data_settings([], "audit") == {}
