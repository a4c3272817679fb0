"""Whole audits without a model: encoders fitted to stored features, pictures, and the output of a given tower."""

import importlib.util
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from testing import tiny_models
from testing.feature_pairs import THINGS
from testing.feature_pairs import make_feature_pairs as make_table
from testing.trained_towers import save_text_tower, save_vision_tower
from transformers import AutoModel, TimmWrapperConfig, TimmWrapperModel

from hf_dissect import audit_by_fit, make_scenes
from hf_dissect.auditing.cross_fit import FitSettings
from hf_dissect.cli import main
from hf_dissect.runs.fit_inputs import load_image_encoder

QUICK = FitSettings(models=1, epochs=2, width=32)


def test_the_command_finds_what_is_mismatched_and_exports_the_rest(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = make_table(900)
    rows.to_parquet("pairs.parquet")
    command = [
        "audit",
        "--fit",
        "pairs.parquet",
        "--id-column",
        "name",
        "--export-clean",
        "clean",
        "--max-fdr",
        "0.05",
    ]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "900 pairs, share of mismatched ones about 2" in said and "against recombined ones, estimated: 0." in said
    table = pq.read_table("audit/scores.parquet")
    assert {"p_mismatched", "local_fdr", "fold", "id"} <= set(table.column_names)
    for row in table.to_pylist():
        assert row["id"] == f"n{row['row']}" and row["fold"] in (0, 1)
        assert row["is_clean"] == rows["clean"][row["row"]] and row["caption"] == rows["caption"][row["row"]]
    is_clean = np.array(table["is_clean"].to_pylist())
    # With four seeds of pairs and encoders: none, at least 0.98, 705 to 718 kept, of which 4.8 to 6.0 % mismatched.
    assert is_clean[:100].mean() < 0.03 and is_clean[-300:].mean() > 0.97
    kept = pq.read_table("clean")
    assert 690 < kept.num_rows < 735 and 0.035 < 1 - np.mean(kept["clean"].to_pylist()) < 0.075
    page = (tmp_path / "audit" / "audit.html").read_text()
    assert "2-fold fit on image features" in page and "local fdr" in page


def test_pictures_and_several_captions(tmp_path):
    rows = make_scenes(150, captions_per_image=2)
    rows.to_parquet(tmp_path / "x.parquet")
    result = audit_by_fit(str(tmp_path / "x.parquet"), settings=QUICK, folds=3, output_dir=tmp_path / "a")
    table = result.table
    assert len(table) == 300 and set(table["fold"].to_pylist()) == {0, 1, 2}
    folds = {}
    for row in table.to_pylist():
        assert folds.setdefault(row["row"], row["fold"]) == row["fold"]
        assert row["caption"] == rows["captions"][row["row"]][row["place"]]
    assert (tmp_path / "a" / "thumbnails").is_dir() and "small pictures" in (tmp_path / "a" / "audit.html").read_text()


def test_a_given_model_encodes_the_images(tmp_path):
    model, processor = tiny_models.tiny_clip()
    for part in (model, processor):
        part.save_pretrained(tmp_path / "clip")
    make_scenes(220).to_parquet(tmp_path / "x.parquet")
    given = {"settings": QUICK, "model": str(tmp_path / "clip")}
    first, again = (
        audit_by_fit(str(tmp_path / "x.parquet"), output_dir=tmp_path / "a", **given).table for _ in range(2)
    )
    assert first.equals(again) and (tmp_path / "a-2").is_dir()
    assert "2-fold fit on features of clip" in (tmp_path / "a" / "audit.html").read_text()
    with pytest.raises(ValueError, match="--model 'nothing' could not be loaded as an encoder of images"):
        audit_by_fit(str(tmp_path / "x.parquet"), model="nothing", output_dir=tmp_path / "b")


@pytest.mark.parametrize("kind", ["vit", "vit_classifier", "resnet"])
def test_a_vision_model_encodes_the_images(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_vision_tower(tmp_path / "vision", kind)
    make_scenes(220).to_parquet("x.parquet")
    command = ["audit", "--fit", "x.parquet", "--model", "vision", "--output-dir", "a"]
    assert main(command) == main([*command, "--seed", "0"]) == 0
    first, second = (pq.read_table(f"{folder}/scores.parquet") for folder in ("a", "a-2"))
    assert first.equals(second) and len(first) == 220 and first["score"].null_count == 0
    assert "2-fold fit on features of vision" in Path("a/audit.html").read_text()
    # A classifier has no weights for the pooling layer of a ViT, so that its first token stands for the picture.
    processor, encode = load_image_encoder(str(tmp_path / "vision"), torch.device("cpu"))
    pixels = processor(images=[Image.new("RGB", (40, 30), "red")], return_tensors="pt")
    with torch.no_grad():
        output = AutoModel.from_pretrained(tmp_path / "vision").eval()(**pixels)
    expected = output.last_hidden_state[:, 0] if kind == "vit_classifier" else output.pooler_output.flatten(1)
    torch.testing.assert_close(encode(pixels), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
def test_a_timm_model_encodes_the_images(tmp_path):
    config = TimmWrapperConfig(architecture="resnet18", do_pooling=True, num_labels=0)
    TimmWrapperModel(config).save_pretrained(tmp_path / "timm")
    processor, encode = load_image_encoder(str(tmp_path / "timm"), torch.device("cpu"))
    pixels = processor(images=[Image.new("RGB", (40, 30), "red")], return_tensors="pt")
    assert encode(pixels).shape == (1, 512)


def test_a_model_that_encodes_no_images_is_refused(tmp_path):
    save_text_tower(tmp_path / "text")
    save_vision_tower(tmp_path / "mae", "mae")
    make_scenes(220).to_parquet(tmp_path / "x.parquet")
    for name, reason in (("text", "reads input_ids"), ("mae", "stays the same from pass to pass")):
        with pytest.raises(ValueError, match=f"--model .*{name}' could not be loaded as an encoder of .*{reason}"):
            audit_by_fit(str(tmp_path / "x.parquet"), model=str(tmp_path / name), output_dir=tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_unreadable_pairs_stand_at_the_end(tmp_path):
    rows = make_table(260).to_list()
    rows[3]["caption"], rows[5]["image_features"], rows[8]["caption"] = None, [0.0] * 3, "  "
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "x.parquet")
    result = audit_by_fit(str(tmp_path / "x.parquet"), settings=QUICK, output_dir=tmp_path / "a")
    assert sorted(result.bad_rows.reasons) == [3, 5, 8]
    last = result.table.slice(257).to_pylist()
    assert [(row["row"], row["score"], row["fold"]) for row in last] == [(3, None, -1), (5, None, -1), (8, None, -1)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "Name a checkpoint to audit by, or let encoders be fitted to the data"),
        (["--fit", "x.parquet", "--folds", "1"], "--folds 1 is not allowed"),
        (
            ["--fit", "x.parquet", "--data", "y", "--ledger", "z"],
            "--data, --ledger: not a setting of an audit with --fit",
        ),
        (["--fit", "few.parquet"], "40 readable pairs are too few to fit encoders"),
        (["--fit", "classes.parquet"], "such as names of classes"),
        (["--fit", "noise.parquet", "--export-clean", "clean"], "--export-clean is refused"),
    ],
)
def test_what_cannot_work_is_refused_with_the_way_out(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    make_table(40).to_parquet("few.parquet")
    same = [f"a photo of a {THINGS[place % 3]}" for place in range(300)]
    make_table(300).remove_columns("caption").add_column("caption", same).to_parquet("classes.parquet")
    make_table(300, rate=1.0).to_parquet("noise.parquet")
    assert main(["audit", *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "clean").exists()
