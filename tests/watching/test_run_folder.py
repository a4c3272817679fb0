"""What the page of a run knows comes from its folder alone, in whatever state the run leaves it."""

import json
import os
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from testing import faulty_run
from testing.tiny_recipe import tiny_recipe
from testing.watched_runs import METRICS, PICTURE, make_live, make_log, make_run
from transformers import TrainerCallback

from hf_dissect.cli import main
from hf_dissect.distillation import DistillationRecipe
from hf_dissect.report.live import LIVE_FILE, LOG_FILE, append_log, find_digests
from hf_dissect.runs.distil import run_distillation
from hf_dissect.runs.run import run_recipe
from hf_dissect.watching.page import render_watched
from hf_dissect.watching.run_folder import MAX_LOGS, RunFolder


class Watches(TrainerCallback):
    """Draws the page in the midst of training, before the first log and after each one."""

    def __init__(self, folder):
        self.folder, self.pages, self.running = folder, [], []

    def look(self):
        watched = RunFolder(self.folder)
        self.pages.append(render_watched(watched, "v"))
        self.running.append(watched.read().running)

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.look()

    def on_log(self, args, state, control, **kwargs):
        self.look()


def test_a_run_is_shown_before_its_first_log_while_it_trains_and_after_its_end(tmp_path):
    trainer = faulty_run.make_trainer(tmp_path, eval_strategy="steps", eval_steps=8)
    trainer.add_callback(watches := Watches(tmp_path))
    trainer.train()
    first, *others = watches.pages
    assert "Training: step 0 of 16" in first and first.count("Nothing was logged yet") == 2 and "No pairs yet" in first
    assert "Training: step 4 of 16" in others[0] and others[0].count("<img") == 24
    assert "recall sum" in others[-1].lower() and all(watches.running)
    trainer.finish()
    seen = RunFolder(tmp_path).read()
    assert seen.status == "Finished." and not seen.running and len(seen.summary.best_kept) == 12
    assert seen.summary.metrics == json.loads((tmp_path / "metrics.json").read_text())


def test_the_results_of_an_earlier_run_are_not_those_of_this_one(tmp_path):
    recipe = tiny_recipe(tmp_path)
    run_recipe(recipe)
    live = make_live(earlier=find_digests(tmp_path, ("metrics.json", "report_data.json")))
    live.save(tmp_path)
    seen = RunFolder(tmp_path).read()
    assert seen.running and seen.status.startswith("Training: step") and len(seen.summary.best_kept) == 1
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    (tmp_path / "metrics.json").write_text(json.dumps({**metrics, "steps": 99}))
    seen = RunFolder(tmp_path).read()
    assert seen.status == "Finished." and seen.summary.metrics["steps"] == 99
    assert len(seen.summary.best_kept) == 1  # report_data.json is still that of the earlier run


def test_a_run_of_an_earlier_version_is_shown_by_its_checkpoint_or_its_report(tmp_path):
    trainer = faulty_run.make_trainer(tmp_path / "run")
    trainer.train()
    trainer.finish()
    for name in (LIVE_FILE, LOG_FILE):
        (tmp_path / "run" / name).unlink()
    assert RunFolder(tmp_path / "run").read().status == "Finished."
    for name in ("metrics.json", "report_data.json"):
        (tmp_path / "run" / name).unlink()
    (tmp_path / "run" / "checkpoint-99").mkdir()  # being written
    seen = RunFolder(tmp_path / "run").read()
    assert "checkpoint-16" in seen.status and seen.summary.log_history and seen.summary.name == "run"
    assert "Loss" in render_watched(RunFolder(tmp_path / "run"), "v")


def make_student(folder, **training) -> DistillationRecipe:
    return DistillationRecipe.from_dict(
        {
            "name": "small",
            "student": {"column": "depth", "config": {"model_type": "frame_sequence_encoder", "grid": [1, 1]}},
            "auxiliaries": {"skeleton": {"config": {"model_type": "sequence_encoder", "num_channels": 60}}},
            "data": {
                **{"source": "npz", "path": str(folder / "x.npz"), "label_column": "action"},
                **{"group_column": "subject", "train_groups": [1, 2, 3, 4], "validation_groups": [5, 6]},
                "test_groups": [7, 8],
            },
            "training": {
                **{"output_dir": str(folder / "run"), "max_steps": 4, "per_device_train_batch_size": 8},
                **{"logging_steps": 1, "report_to": "none", "use_cpu": True, **training},
            },
        }
    )


def test_a_distillation_is_shown_while_it_trains(tmp_path):
    np.savez(
        tmp_path / "x.npz",
        depth=np.zeros((32, 2, 8, 8), np.uint8),
        skeleton=np.ones((32, 4, 20, 3), np.float32),
        action=np.arange(32) // 8,
        subject=np.arange(32) % 8 + 1,
    )
    run_distillation(make_student(tmp_path))
    folder = tmp_path / "run"
    seen = RunFolder(folder).read()
    assert seen.is_distillation and seen.status == "Finished." and len(seen.summary.log_history) >= 4
    (folder / "metrics.json").unlink()
    page = render_watched(RunFolder(folder), "v")
    assert "Trained to the end (step 4 of 4" in page and "Discriminator" in page and "small" in page
    (folder / LIVE_FILE).write_text(json.dumps(json.loads((folder / LIVE_FILE).read_text()) | {"state": "training"}))
    (folder / LOG_FILE).write_text("")
    assert "Nothing was logged yet" in render_watched(RunFolder(folder), "v")


@pytest.mark.parametrize("name", [LIVE_FILE, LOG_FILE, "metrics.json", "report_data.json"])
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'{"final": 3, "times": [], "selection": 7}', b"\xff\x00" * 99]
)
def test_damaged_files_are_passed_over(tmp_path, name, content):
    (make_run(tmp_path) / "metrics.json").write_text(json.dumps({**METRICS, "unfinished": True}))
    (tmp_path / name).write_bytes(content)
    assert "<h1>" in render_watched(RunFolder(tmp_path), "v")


def test_many_logs_are_thinned_and_evaluations_stay(tmp_path):
    make_run(tmp_path, steps=0)
    lines = [json.dumps(make_log(step)) for step in range(1, 9002)]
    lines.insert(5000, json.dumps({"eval_loss": 1.0, "step": 5000}))
    (tmp_path / LOG_FILE).write_text("\n".join(lines) + "\n")
    logs = RunFolder(tmp_path).read().summary.log_history
    assert len(logs) <= MAX_LOGS + 2 and logs[-1]["step"] == 9001 and {"eval_loss": 1.0, "step": 5000} in logs


def test_an_audit_in_the_folder_is_shown(tmp_path):
    folder = RunFolder(make_run(tmp_path / "run"))
    assert folder.audit.read() is None and folder.audit.find_version() == ""
    place = tmp_path / "run" / "audit"
    (place / "thumbnails" / "0").mkdir(parents=True)
    PICTURE.save(place / "thumbnails" / "0" / "7.jpg")
    secret = tmp_path / "secret"
    secret.write_text("SECRET")
    (place / "thumbnails" / "0" / "8.jpg").symlink_to(secret)
    table = {
        "sample_id": np.arange(20),
        "row": np.arange(20) + 7,
        "caption": ["<script>alert(1)</script>", None] * 10,
        "p_mismatched": [0.9] * 10 + [None] * 5 + [0.1] * 5,
        "score": np.linspace(-5, 5, 20),
    }
    pq.write_table(pa.table(table), place / "scores.parquet")
    page = render_watched(folder, "v")
    # (10 * 0.9 + 5 * 0.1) / 15
    assert "20 pairs were audited, of which about 63.3% are mismatched" in page and "audit/audit.html" in page
    audit = folder.audit.read()
    assert [card["picture"] is not None for card in audit["cards"]] == [True] + [False] * 11
    assert page.count("&lt;script&gt;alert(1)") == 6 and "<script>alert" not in page
    version = folder.find_version()
    (place / "scores.parquet").write_bytes(b"PAR1 half a file")
    assert folder.find_version() != version and "Audit" not in render_watched(folder, "v")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("absent", "is not there; name the folder of a run"),
        ("file", "is a file; name the folder"),
        ("empty", "is not a run folder"),
        ("checkpoint", "is a checkpoint; name the folder of its run: hf-dissect watch"),
        ("runs", "holds several runs; name one of them"),
        ("audit", "holds an audit and not a run; open"),
        ("model", "is not a run folder"),
    ],
)
def test_what_is_not_a_run_folder_is_said_in_one_line(tmp_path, capsys, kind, words):
    place = tmp_path / ("checkpoint-4" if kind == "checkpoint" else "x")
    if kind == "file":
        place.touch()
    elif kind != "absent":
        place.mkdir()
    if kind == "checkpoint":
        (place / "trainer_state.json").write_text("{}")
    elif kind == "runs":
        make_run(place / "dissect-seed0")
        (place / "metrics.json").write_text("{}")
    elif kind == "audit":
        (place / "scores.parquet").touch()
    elif kind == "model":
        (place / "config.json").write_text("{}")
    assert main(["watch", str(place), "--no-browser"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("hf-dissect: ") and words in error and error.count("\n") == 1


@pytest.mark.parametrize("port", ["-1", "65536", "x", "8050.5", ""])
def test_a_port_that_is_none_is_refused(tmp_path, capsys, port):
    with pytest.raises(SystemExit):
        main(["watch", str(tmp_path), "--port", port])
    assert "allowed: an integer from 0 to 65535" in capsys.readouterr().err or port == "-1"


def test_a_copied_folder_and_one_that_is_removed(tmp_path):
    make_run(tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    folder = RunFolder(tmp_path / "copy")
    assert folder.read().summary.log_history == RunFolder(tmp_path / "run").read().summary.log_history
    os.replace(tmp_path / "run" / LOG_FILE, tmp_path / "copy" / LOG_FILE)  # as a resumed run does
    append_log(tmp_path / "copy", make_log(40))
    assert [entry["step"] for entry in folder.read().summary.log_history] == [10, 20, 30, 40]
    shutil.rmtree(tmp_path / "copy")
    assert folder.find_age() is None and folder.find_version()
    with pytest.raises(FileNotFoundError):
        folder.read()
