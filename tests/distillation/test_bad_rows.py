"""Rows of a distillation that cannot be used: the cause in warning, error, figures and report."""

import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image
from testing import tiny_models
from testing.tiny_modalities import tiny_columns, tiny_trainer

from hf_dissect.cli import main
from hf_dissect.data import make_scenes
from hf_dissect.data.problems import read_problems, split_problem
from hf_dissect.data.surrogates import escape_unencodable
from hf_dissect.distillation.data_collator import DistillationCollator, RowState
from hf_dissect.distillation.diagnostics import RowCounts

PICTURE = Image.new("RGB", (8, 8), "red")


def collate(*rows: dict) -> dict:
    """Collate rows of a picture, a text and an array, given in part; everything else is sound."""
    processors = {"image": tiny_models.square_image_processor(), "text": tiny_models.bert_tokenizer()}
    collator = DistillationCollator(["image", "text", "array"], {"array": "x"}, processors, {"array": (2,)})
    sound = {"image": PICTURE, "text": "red", "array": [1.0, 2.0], "label": 1}
    return collator([{**sound, **row, "row": place} for place, row in enumerate(rows)])


@pytest.mark.parametrize(
    ("row", "state", "problem", "path"),
    [
        ({}, "COMPLETE", None, None),
        ({"label": -1}, "LABEL_MISSING", None, None),
        ({"text": " "}, "AUXILIARY_MISSING", None, None),
        ({"text": None, "array": []}, "AUXILIARY_MISSING", None, None),
        ({"image": "/nowhere/7.jpg"}, "STUDENT_UNREADABLE", "image: no such file", "/nowhere/7.jpg"),
        ({"image": {"bytes": b"<html>", "path": "a/b.png"}}, "STUDENT_UNREADABLE", "image: .*<html>", "a/b.png"),
        ({"image": None, "array": [1.0]}, "STUDENT_MISSING", "image: missing", None),
        ({"image": None, "label": -1}, "STUDENT_MISSING", "image: missing", None),
        ({"text": 5}, "AUXILIARY_UNREADABLE", "text: int in place of text: 5", None),
        (
            {"text": escape_unencodable("a\ud83d")},
            "AUXILIARY_UNREADABLE",
            "text: text that cannot be encoded: 'a",
            None,
        ),
        ({"text": "\udc00"}, "AUXILIARY_UNREADABLE", "text: text that cannot be encoded", None),
        ({"array": [1.0, 2.0, 3.0]}, "AUXILIARY_UNREADABLE", r"array: an array of shape .3,., not .2,.", None),
        ({"array": ["a", "b"]}, "AUXILIARY_UNREADABLE", "array: no array of numbers .could not convert", None),
        ({"array": [1.0, np.inf]}, "AUXILIARY_NOT_FINITE", "array: 1 numbers that are not finite", None),
        ({"text": None, "array": [np.nan, 1.0]}, "AUXILIARY_NOT_FINITE", "array: 1 numbers", None),
        ({"text": 5, "array": None}, "AUXILIARY_UNREADABLE", "text: int in place", None),
        ({"label": -1, "array": None}, "LABEL_AND_AUXILIARY_MISSING", "array: missing", None),
        ({"label": -1, "array": [1.0]}, "LABEL_AND_AUXILIARY_MISSING", "array: an array of shape", None),
    ],
)
def test_a_row_says_why_it_cannot_be_used(row, state, problem, path):
    import re

    batch = collate({}, row, {})
    assert batch["row_state"].tolist() == [0, RowState[state], 0]
    problems = read_problems(batch)
    if problem is None:
        assert problems == {}
        return
    found, where = split_problem(problems.pop(1))
    assert problems == {} and re.match(problem, found) and where == path
    texts = batch["inputs"]["text"]["input_ids"]
    assert batch["inputs"]["image"]["pixel_values"].isfinite().all() and len(texts) == 3


def make_bad_columns() -> dict:
    columns = {name: list(values) for name, values in tiny_columns().items()}
    columns["skeleton"][1] = np.full((6, 2, 3), np.inf, np.float32)
    columns["skeleton"][2] = np.full((6, 2, 3), -np.inf, np.float32)
    columns["inertial"][3] = np.zeros((5, 2))
    columns["inertial"][4] = None  # a sound row, which trains the student alone
    return columns


def test_warning_figures_and_report_have_the_cause(tmp_path, caplog):
    trainer = tiny_trainer(tmp_path, make_bad_columns(), num_train_epochs=2, max_steps=-1, save_run_folder=True)
    trainer.train()
    warnings = [record.getMessage() for record in caplog.records if "as a whole" in record.getMessage()]
    assert len(warnings) == 2  # one of each kind
    assert any("cannot be used as a whole (auxiliary not finite: skeleton: 36 numbers" in text for text in warnings)
    assert any("Row 3 cannot be" in text and "shape (5, 2), not (8, 2)" in text for text in warnings)
    rows = json.loads((tmp_path / "metrics.json").read_text())["rows"]
    assert [entry["id"] for entry in rows["problems"]] == [1, 2, 3] and rows["student_only"] == 4
    page = (tmp_path / "report.html").read_text()
    assert "row 3: inertial: an array of shape (5, 2), not (8, 2)" in page and "row 1: skeleton: 36" in page


def test_a_run_without_such_rows_says_nothing(tmp_path, caplog):
    columns = {name: list(values) for name, values in tiny_columns().items()}
    columns["inertial"][4] = columns["action"][5] = None
    trainer = tiny_trainer(tmp_path, columns, num_train_epochs=1, max_steps=-1, save_run_folder=True)
    trainer.train()
    assert "problems" not in json.loads((tmp_path / "metrics.json").read_text())["rows"]
    assert "as a whole" not in caplog.text


def test_the_cause_is_kept_when_a_run_is_resumed(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    first = tiny_trainer(tmp_path, make_bad_columns(), **settings)
    first.train()
    resumed = tiny_trainer(tmp_path, make_bad_columns(), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.rows.summary() == first.rows.summary() and len(resumed.rows.problems) == 3


def test_states_of_an_earlier_version_are_read():
    counts = RowCounts(0.5, 10)
    counts.load_state_dict({"3": int(RowState.STUDENT_MISSING)})
    assert counts.states == {3: RowState.STUDENT_MISSING} and counts.problems == {}
    new = RowCounts(0.5, 10)
    new.add(torch.tensor([5]), torch.tensor([int(RowState.STUDENT_UNREADABLE)]), {0: "image: no such file"})
    joined = RowCounts.join_states([counts.state_dict(), {"4": 1}, new.state_dict()])
    counts.load_state_dict(joined)
    assert counts.states == {3: RowState.STUDENT_MISSING, 4: RowState.LABEL_MISSING, 5: RowState.STUDENT_UNREADABLE}
    assert counts.summary()["problems"] == [{"id": 5, "problem": "image: no such file", "path": None}]


def test_a_picture_that_is_gone_is_named_by_its_path(tmp_path, caplog):
    for part in tiny_models.tiny_clip():
        part.save_pretrained(tmp_path / "clip")
    lines = ["image,caption,label"]
    for place, row in enumerate(make_scenes(40)):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{place}.png").write_bytes(row["image"]["bytes"])
        lines.append(f'{place}.png,"{row["caption"]}",{("wren", "robin")[place % 2]}')
    (tmp_path / "data" / "train.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "data" / "7.png").unlink()
    (tmp_path / "data" / "8.png").write_bytes(b"<html>")
    clip = [f"student.name_or_path={tmp_path / 'clip'}", f"auxiliaries.caption.name_or_path={tmp_path / 'clip'}"]
    run = ["training.num_train_epochs=1", "training.save_strategy=no", "training.eval_strategy=no"]
    run += ["training.per_device_train_batch_size=8", "training.use_cpu=true", "training.report_to=none"]
    data = [f"data.path={tmp_path / 'data'}", "data.validation_split=null", "data.test_split=null"]
    command = ["train", "amid-clip", *data, *clip, *run, "--output-dir", str(tmp_path / "run")]
    with caplog.at_level(logging.WARNING):
        assert main([*command, "data.max_bad_fraction=0.1"]) == 0
    assert "student unreadable: image: " in caplog.text
    problems = json.loads((tmp_path / "run" / "metrics.json").read_text())["rows"]["problems"]
    assert [(entry["id"], entry["path"][-10:]) for entry in problems] == [(7, "data/7.png"), (8, "data/8.png")]
    assert "no such file" in problems[0]["problem"] and "<html>" in problems[1]["problem"]
    assert f"{tmp_path}/data/7.png" in (tmp_path / "run" / "report.html").read_text()
