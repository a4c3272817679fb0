"""With `data.skip_bad_shards`, the rest of a damaged shard is skipped, warned of and recorded in the figures."""

import itertools
import json
import shutil

import pytest
from testing import tiny_models
from testing.shard_server import serving
from testing.tar_files import write_tar
from testing.tiny_recipe import tiny_recipe, write_tiny_recipe

from hf_dissect import DissectTrainer, DissectTrainingArguments, make_scenes
from hf_dissect.cli import main
from hf_dissect.data import load_splits
from hf_dissect.data.pairs import as_pairs
from hf_dissect.data.shards.skipped import summarize_skipped
from hf_dissect.data.streaming.loader import StreamLoader
from hf_dissect.runs.run import run_recipe

ROWS = 16


def write_shards(folder, names=("train-0", "train-1", "train-2")):
    rows = make_scenes(ROWS * len(names))
    for place, name in enumerate(names):
        members = {}
        for row in range(place * ROWS, (place + 1) * ROWS):
            members[f"{row}.png"] = rows[row]["image"]["bytes"]
            members[f"{row}.txt"] = rows[row]["caption"].encode()
        write_tar(folder / f"{name}.tar", members)


def cut(file, keys_kept):
    """Cut a shard behind a number of its pairs, at the edge of a member."""
    content, place = file.read_bytes(), 0
    for _ in range(2 * keys_kept):
        size = int(content[place + 124 : place + 135], 8)
        place += 512 + -(-size // 512) * 512
    file.write_bytes(content[:place])


@pytest.fixture
def shards(tmp_path):
    write_shards(tmp_path / "shards")
    cut(tmp_path / "shards" / "train-1.tar", 5)
    (tmp_path / "shards" / "train-2.tar").write_bytes(b"<html>")
    return tmp_path / "shards"


def load(path, **settings):
    return load_splits(source="webdataset", path=str(path), **settings)


def expect(skipped):
    return {shard.rpartition("/")[2] for shard in skipped} == {"train-1.tar", "train-2.tar"}


@pytest.mark.parametrize("streaming", [False, True])
def test_a_damaged_shard_is_an_error_otherwise(shards, streaming):
    message = (
        r"'.*/train-1\.tar' is not a readable tar file \(the file ends at byte \d+ without .*set data\.skip_bad_sha"
    )
    with pytest.raises(ValueError, match=message):
        list(load(shards, streaming=streaming)["train"])


def test_tables_keep_the_record_also_from_the_cache(shards, caplog):
    for _ in range(2):
        caplog.clear()
        rows = load(shards, skip_bad_shards=True, max_train_rows=20, noise_rate=0.2)["train"]
        assert len(load(shards, skip_bad_shards=True)["train"]) == ROWS + 5 and len(rows) == 20
        assert expect(as_pairs(rows).skipped_shards)
        assert "train-1.tar' is not read to its end (the file ends at byte" in caplog.text
    shutil.copy(shards / "train-0.tar", shards / "train-2.tar")
    repaired = load(shards, skip_bad_shards=True)["train"]
    assert len(repaired) == 2 * ROWS + 5 and len(as_pairs(repaired).skipped_shards) == 1
    assert as_pairs(load(shards / "train-0.tar")["train"]).skipped_shards == {}


@pytest.mark.parametrize("workers", [0, 2])
def test_streams_record_in_workers_and_when_resumed(shards, workers):
    def make_loader():
        stream = as_pairs(load(shards, streaming=True, skip_bad_shards=True)["train"])
        return StreamLoader(stream, list, 5, num_workers=workers, shuffle_buffer=8)

    loader = make_loader()
    batches = [[pair["caption"] for pair in batch] for batch in itertools.islice(loader, 12)]
    assert expect(loader.dataset.skipped_shards)
    captions = set(make_scenes(3 * ROWS)["caption"][: ROWS + 5])
    assert set(itertools.chain(*batches)) == captions
    place = json.loads(json.dumps(loader.state_dict()))
    resumed = make_loader()
    resumed.load_state_dict(place)
    assert expect(resumed.dataset.skipped_shards)
    following = [[pair["caption"] for pair in batch] for batch in itertools.islice(resumed, 6)]
    assert following == [[pair["caption"] for pair in batch] for batch in itertools.islice(loader, 6)]
    other = StreamLoader(make_loader().dataset, list, 7, num_workers=1)
    other.load_state_dict(place)
    next(iter(other))
    assert expect(other.dataset.skipped_shards) and expect(other.state_dict()["workers"][0]["skipped_shards"])


def test_the_ranks_together_know_all(shards):
    known = {}
    for rank in range(2):
        stream = as_pairs(load(shards, streaming=True, skip_bad_shards=True)["train"])
        list(itertools.islice(StreamLoader(stream, list, 4, rank=rank, world_size=2), 8))
        known |= stream.skipped_shards
    assert expect(known)


def test_a_pass_by_hand_records_as_well(shards):
    stream = as_pairs(load(shards, streaming=True, skip_bad_shards=True)["train"])
    assert len(list(stream)) == ROWS + 5 and expect(stream.skipped_shards)


def test_shards_that_go_missing_in_a_run_end_it_at_the_latest_with_the_last_one(tmp_path):
    write_shards(tmp_path / "files")
    with serving(tmp_path / "files") as server:
        path = f"{server.address}/train-{{0..2}}.tar"
        stream = as_pairs(load(path, streaming=True, skip_bad_shards=True)["train"])
        (tmp_path / "files" / "train-1.tar").unlink()
        batches = iter(StreamLoader(stream, list, 8))
        captions = make_scenes(3 * ROWS)["caption"]
        seen = {pair["caption"] for batch in itertools.islice(batches, 8) for pair in batch}
        assert set(captions[:ROWS] + captions[2 * ROWS :]) <= seen
        assert [shard[-11:] for shard in stream.skipped_shards] == ["train-1.tar"]
        for name in ("train-0", "train-2"):
            (tmp_path / "files" / f"{name}.tar").unlink()
        with pytest.raises(ValueError, match=r"no rows.* 3 shards were skipped, .*HTTP Error 404"):
            list(itertools.islice(batches, 100))


@pytest.mark.parametrize("streaming", [False, True])
def test_the_figures_of_a_run_name_the_shards(shards, tmp_path, streaming):
    data = {
        "source": "webdataset", "path": str(shards), "streaming": streaming, "skip_bad_shards": True,
        "validation_split": None, "test_split": None, "num_workers": 1 if streaming else 0,
    }  # fmt: skip
    data |= {"noise_rate": 0}
    training = {"max_steps": 6, "per_device_train_batch_size": 8}
    metrics = run_recipe(tiny_recipe(tmp_path / "run", data=data, evaluation={"retrieval": False}, training=training))
    skipped = json.loads((tmp_path / "run" / "metrics.json").read_text())["skipped_shards"]
    assert metrics["skipped_shards"] == skipped and skipped["count"] == 2
    assert skipped["shards"]["train-2.tar"].startswith("the file is cut off in the header at byte 0")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "2 shards were not read to their end" in page and "train-1.tar: the file ends at byte" in page
    assert "Shards not read to their end" in (tmp_path / "run" / "README.md").read_text()


@pytest.mark.parametrize("damaged", [("test",), ("validation", "test"), ("train", "validation")])
def test_shards_of_the_other_splits_are_counted_under_their_names(tmp_path, damaged, capsys):
    rows = {split: make_scenes(24, split=split) for split in ("train", "validation", "test")}
    for split, scenes in rows.items():
        members = {}
        for place, row in enumerate(scenes):
            members[f"{place:03}.png"] = row["image"]["bytes"]
            members[f"{place:03}.txt"] = row["caption"].encode()
        write_tar(tmp_path / "shards" / f"{split}-0.tar", members)
        content = (tmp_path / "shards" / f"{split}-0.tar").read_bytes()
        (tmp_path / "shards" / f"{split}-1.tar").write_bytes(
            content[: len(content) // 2] if split in damaged else content
        )
    unused = dict.fromkeys(("scenes_train", "scenes_validation", "scenes_test"))
    data = {
        **unused,
        "source": "webdataset",
        "path": str(tmp_path / "shards"),
        "skip_bad_shards": True,
        "noise_rate": 0,
    }
    file = write_tiny_recipe(tmp_path / "recipe.yaml", data=data, training={"max_steps": 2})
    assert main(["train", str(file), "--output-dir", str(tmp_path / "run")]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    skipped, said = metrics["skipped_shards"], capsys.readouterr().out
    page, card = ((tmp_path / "run" / name).read_text() for name in ("report.html", "README.md"))
    assert skipped["count"] == ("train" in damaged) == len(skipped["shards"])
    assert skipped.keys() == {"count", "shards", *damaged} - {"train"}
    for split in damaged:
        entry = skipped if split == "train" else skipped[split]
        assert entry["count"] == 1 and entry["shards"][f"{split}-1.tar"].startswith("the file ")
        assert (
            f"1 shards of the split {split} were not read to their end" in said and f"{split}-1.tar: the file" in page
        )
        assert split == "train" or (
            f"1 shards were not read to their end ({split})" in page and f"1 ({split})" in card
        )


def test_the_test_split_is_not_mixed_up_with_the_one_evaluated_in_its_place(shards, tmp_path):
    rows = load(shards, skip_bad_shards=True)["train"]
    settings = {"max_steps": 1, "per_device_train_batch_size": 8, "use_cpu": True, "report_to": "none"}
    model, processor = tiny_models.tiny_clip()
    trainer = DissectTrainer(
        model=model,
        processing_class=processor,
        train_dataset=tiny_models.tiny_pairs(16),
        eval_dataset={"first": rows, "second": tiny_models.tiny_pairs(4)},
        args=DissectTrainingArguments(str(tmp_path), save_run_folder=False, save_strategy="no", **settings),
    )
    trainer.train()
    skipped = trainer.finish()["skipped_shards"]
    assert (skipped["count"], skipped["validation"]["count"]) == (0, 2) and "test" not in skipped


def test_shards_that_are_all_damaged(tmp_path):
    write_tar(tmp_path / "0.tar", {})
    (tmp_path / "1.tar").write_bytes(b"<html>" * 200)
    for streaming in (False, True):
        with pytest.raises(
            ValueError, match=r"holds no samples.* 1 shards were skipped, .*1\.tar' \(the file does not"
        ):
            load(tmp_path, streaming=streaming, skip_bad_shards=True)


def test_shards_of_the_same_name_are_told_apart():
    given = {"/x/a/0.tar": "one", "/x/b/0.tar": "two"}
    assert summarize_skipped(given) == {"count": 2, "shards": {"a/0.tar": "one", "b/0.tar": "two"}}
    assert summarize_skipped({"hf://d/u/n/1.tar": "x"}) == {"count": 1, "shards": {"1.tar": "x"}}


def test_the_setting_is_for_shards(tmp_path):
    with pytest.raises(ValueError, match="data.skip_bad_shards is true, but data.source is 'folder'"):
        load_splits(source="folder", path=str(tmp_path), skip_bad_shards=True)
    with pytest.raises(ValueError, match="data.skip_bad_shards"):
        tiny_recipe(tmp_path, data={"skip_bad_shards": True})
