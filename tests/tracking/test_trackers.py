"""The trackers get the pairs of an evaluation and the alerts: the real packages, offline, read back from the disk."""

import io
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from testing import faulty_run, tiny_models
from transformers.integrations import TensorBoardCallback

from hf_dissect.report.data import PairSample
from hf_dissect.tracking.alerts import Alert
from hf_dissect.tracking.trackers import COLUMNS, Trackers

SECRET = "see /home/ada/secret.jpg or https://x.example/y, hf_abcdefghijklmnop"


class Handler:
    """Holds callbacks as the Trainer does."""

    def __init__(self, *callbacks):
        self.callbacks = list(callbacks)


def make_pairs() -> dict[str, list[PairSample]]:
    picture = Image.new("RGB", (40, 20), "red")
    picture.getexif()[0x010E] = "somewhere"
    best = [PairSample(2**60, f"a | <b>dog</b> ![x](y) {SECRET}", 31.0, None, None, None)]
    best.append(PairSample(7, "\ud800 \n two", 30.0, 1.5, True, picture))
    return {"best_kept": best, "worst_dropped": [PairSample(8, "three", 1.0, 0.5, False, picture)], "none": []}


def train(folder: Path, **settings) -> None:
    """A run with an alert and two evaluations."""
    trainer = faulty_run.make_trainer(
        folder, **{"bad_row": True, "max_bad_fraction": 0.02, "eval_strategy": "steps", "eval_steps": 8, **settings}
    )
    trainer.train()
    trainer.finish()


def read_events(folder: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance={"images": 0, "tensors": 0}).Reload()


def read_text(events, tag: str) -> list[str]:
    return [event.tensor_proto.string_val[0].decode() for event in events.Tensors(f"{tag}/text_summary")]


def test_tensorboard_gets_pictures_a_table_and_alerts(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    train(tmp_path, report_to="tensorboard")
    (place,) = Path(tmp_path, "runs").iterdir()
    events = read_events(place)
    for name in ("best_kept", "worst_dropped"):
        images = events.Images(f"pairs/{name}")
        # Both evaluations during training; the final one is of the same step as the second.
        assert [image.step for image in images] == [8, 16]
        picture = Image.open(io.BytesIO(images[-1].encoded_image_string))
        assert picture.width % 162 == 2 or picture.width >= 160  # a grid of squares of 160 pixels
        tables = read_text(events, f"pairs/{name}")
        assert len(tables) == 2 and tables[0].count("\n") == 13 and "| caption |" in tables[0]
        assert any(colour in tables[0] for colour in tiny_models.COLOURS)
    (alert,) = read_text(events, "alerts/skipped_rows")
    assert alert.startswith("Many rows are skipped. 1 of 64 rows cannot be used")


def test_what_is_private_or_markup_is_not_sent(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        trackers = Trackers(Handler(TensorBoardCallback(writer)))
        assert trackers.used
        trackers.send_pairs(make_pairs(), 5)
        trackers.send_alert(Alert("x", "Title", f"Text {SECRET}"), 5)
    events = read_events(tmp_path)
    text = read_text(events, "pairs/best_kept")[0] + read_text(events, "alerts/x")[0]
    assert text.count("[left out\\]") == 6 and "ada" not in text and "example" not in text and "hf_abc" not in text
    assert "&lt;b&gt;dog" in text and "!\\[x\\](y)" in text and "a \\| " in text
    assert b"somewhere" not in b"".join(path.read_bytes() for path in tmp_path.iterdir())
    picture = Image.open(io.BytesIO(events.Images("pairs/best_kept")[0].encoded_image_string))
    assert picture.height == 160 or picture.height == 164


def test_nothing_is_sent_where_it_is_switched_off_or_there_is_no_tracker(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    train(tmp_path, report_to="tensorboard", report_pairs=False)
    (place,) = Path(tmp_path, "runs").iterdir()
    events = read_events(place)
    assert events.Tags()["images"] == [] and read_text(events, "alerts/skipped_rows")
    assert not Trackers(Handler()).used


def test_a_tracker_that_fails_ends_nothing(tmp_path, caplog):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")

    class Broken:
        def __getattr__(self, name):
            raise OSError("no network\nat all")

    trackers = Trackers(Handler(TensorBoardCallback(Broken())))
    for step in range(3):
        trackers.send_pairs(make_pairs(), step)
        trackers.send_alert(Alert("x", "Title", "Text"), step)
    messages = [record.message for record in caplog.records]
    assert messages == ["TensorBoard did not take what was sent (OSError: no network); training continues."]


# In a process of its own, as both packages keep what they started until the process ends.
PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from testing import faulty_run
trainer = faulty_run.make_trainer(
    Path("run"), bad_row=True, max_bad_fraction=0.02, eval_strategy="steps", eval_steps=8, report_to={tracker!r},
    run_name="mine", project="ours",
)
trainer.train()
trainer.finish()
if {tracker!r} == "wandb":
    import wandb
    wandb.finish()
"""


def run_offline(folder: Path, tracker: str) -> subprocess.CompletedProcess:
    places = {name: str(folder) for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR")}
    places |= {"TRACKIO_DIR": str(folder / "trackio"), "WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"}
    program = PROGRAM.format(tests=str(Path(__file__).parents[1]), tracker=tracker)
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=folder, env={**os.environ, **places}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "training continues" not in done.stderr
    return done


def test_wandb_gets_tables_with_pictures_and_alerts(tmp_path):
    pytest.importorskip("wandb", reason="wandb is not installed")
    run_offline(tmp_path, "wandb")
    tables = sorted(tmp_path.rglob("media/table/pairs/*.table.json"))
    assert {path.name.rsplit("_", 2)[0] for path in tables} == {"best_kept", "worst_dropped"} and len(tables) == 4
    table = json.loads(tables[0].read_text())
    assert table["columns"] == list(COLUMNS) and len(table["data"]) == 12
    assert any(colour in table["data"][0][1] for colour in tiny_models.COLOURS)
    assert table["data"][0][4] in ("matched", "mismatched")
    (log,) = tmp_path.rglob("*.wandb")
    assert b"Many rows are skipped" in log.read_bytes()
    pictures = [path for path in tmp_path.rglob("*") if path.is_file() and path.read_bytes()[:4] == b"\x89PNG"]
    assert len(pictures) >= 12


def test_trackio_gets_tables_with_pictures_and_alerts(tmp_path):
    pytest.importorskip("trackio", reason="trackio is not installed")
    run_offline(tmp_path, "trackio")
    with sqlite3.connect(tmp_path / "trackio" / "ours.db") as database:
        logged = [json.loads(row[0]) for row in database.execute("select metrics from metrics")]
        alerts = database.execute("select * from alerts").fetchall()
    tables = [entry["pairs/best_kept"] for entry in logged if "pairs/best_kept" in entry]
    assert len(tables) == 2 and tables[0]["_type"] == "trackio.table" and len(tables[0]["_value"]) == 12
    first = tables[0]["_value"][0]
    assert list(first) == list(COLUMNS) and any(colour in first["caption"] for colour in tiny_models.COLOURS)
    assert Image.open(tmp_path / "trackio" / "media" / first["picture"]["file_path"]).size == (32, 32)
    assert len(alerts) == 1 and "Many rows are skipped" in map(str, alerts[0])
