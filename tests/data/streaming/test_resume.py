"""A stopped stream goes on with the very next batch, without doing again what is done."""

import itertools
import json

import pytest
import torch
from datasets import Dataset, IterableDataset, interleave_datasets, load_dataset
from testing.launched import exit_code_of
from testing.tar_files import write_tar
from testing.tiny_streams import (
    UNEQUAL,
    all_captions,
    captions_of,
    first_batches,
    loader_of,
    one_pass,
    real_loader,
    rows_of_shards,
    stream_of,
    write_rest,
)

from hf_dissect.data import load_splits
from hf_dissect.data.pairs import as_pairs


def assert_resumes(make_loader, count, every=1):
    """Stopping after every so many batches, always from the place that the resumed loader tells, changes nothing."""
    batches, _, passes = first_batches(make_loader(), count)
    assert passes == sorted(passes)
    place, found, found_passes = json.dumps(make_loader().state_dict()), [], [0]
    while len(found) < count:
        resumed = make_loader()
        resumed.load_state_dict(json.loads(place))
        assert resumed.passes == found_passes[-1]
        next_batches, places, next_passes = first_batches(resumed, min(every, count - len(found)))
        found, found_passes, place = found + next_batches, found_passes + next_passes[1:], places[-1]
    assert found_passes == passes
    for number, (batch, expected) in enumerate(zip(found, batches, strict=True)):
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[name], expected[name]) for name in batch), f"batch {number} differs"
    return passes[-1]


@pytest.mark.parametrize("captions", [1, 3])
@pytest.mark.parametrize("shuffle_buffer", [0, 4, 1000])
@pytest.mark.parametrize("sizes", [UNEQUAL, (13,)])
def test_a_stop_after_any_batch_changes_nothing(sizes, shuffle_buffer, captions):
    def make_loader():
        return loader_of(stream_of(sizes, captions), world_size=2, rank=1, shuffle_buffer=shuffle_buffer, seed=5)

    assert assert_resumes(make_loader, 12 * captions) >= 2  # beyond the ends of passes


@pytest.mark.parametrize("sizes", [UNEQUAL, (13,)])
@pytest.mark.parametrize("shuffle_buffer", [0, 4])
def test_a_stop_changes_nothing_for_workers(sizes, shuffle_buffer):
    def make_loader():
        return loader_of(stream_of(sizes, captions=2), num_workers=2, shuffle_buffer=shuffle_buffer)

    assert assert_resumes(make_loader, 35, every=5) >= 2


def parquet_stream(folder):
    for shard, size in enumerate((30, 7, 41)):
        rows = list(rows_of_shards([(shard, size)], captions=2))
        Dataset.from_list(rows).to_parquet(str(folder / f"train-{shard}.parquet"), batch_size=8)
    return load_dataset("parquet", data_files=str(folder / "*.parquet"), split="train", streaming=True)


def interleaved_stream(folder):
    tables = [Dataset.from_list(list(rows_of_shards([(shard, 20)], captions=1))) for shard in range(2)]
    streams = [table.to_iterable_dataset(num_shards=2) for table in tables]
    return interleave_datasets(streams, probabilities=[0.7, 0.3], seed=1)


SOURCES = {
    "parquet": parquet_stream,
    "filtered": lambda folder: parquet_stream(folder).filter(lambda row: not row["image"].endswith("3")),
    "mapped": lambda folder: parquet_stream(folder).map(lambda row: {"image": row["image"] + "!"}),
    "mapped in batches": lambda folder: parquet_stream(folder).map(lambda rows: rows, batched=True, batch_size=4),
    "taken": lambda folder: parquet_stream(folder).take(33),
    "skipped": lambda folder: parquet_stream(folder).skip(20),
    "table": lambda folder: Dataset.from_list(list(rows_of_shards([(0, 40)], 2))).to_iterable_dataset(num_shards=5),
    "interleaved": interleaved_stream,
}


@pytest.mark.parametrize("source", SOURCES)
def test_streams_of_all_kinds_resume_and_are_split(tmp_path, monkeypatch, source):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    stream = as_pairs(SOURCES[source](tmp_path))

    def make_loader():
        return loader_of(stream, batch_size=4, world_size=2, shuffle_buffer=5)

    assert_resumes(make_loader, 40)
    assert_resumes(make_loader, 40, every=7)
    if source != "interleaved":  # which ends when its first source does
        assert sorted(one_pass(stream, num_parts=4, number=1, seed=(3,))) == all_captions(stream)


def test_a_resume_does_not_collate_again_nor_open_shards_that_are_done(tmp_path):
    for shard, size in enumerate((4, 3, 8, 8)):
        members = {}
        for row in range(size):
            members.update({f"{row}.jpg": b"not a picture", f"{row}.txt": f"{shard}/{row}".encode()})
        write_tar(tmp_path / "shards" / f"{shard}.tar", members)
    stream = as_pairs(load_splits(source="webdataset", path=str(tmp_path / "shards"), streaming=True)["train"])
    batches, states, _ = first_batches(loader_of(stream), 6)
    for shard in range(2):
        (tmp_path / "shards" / f"{shard}.tar").write_bytes(b"damaged")
    for workers in (0, 1):
        log = tmp_path / f"collated-{workers}"
        resumed = loader_of(stream, log=log)
        resumed.load_state_dict(json.loads(states[3]))
        found = [captions_of(batch) for batch in itertools.islice(resumed, 3)]
        assert found == [captions_of(batch) for batch in batches[3:]] and found[0][0] == "2/2"
        assert log.read_text().split() == [caption for batch in found for caption in batch]
    with pytest.raises(ValueError, match=r"^'.*0\.tar' is not a readable tar file"):
        next(iter(loader_of(stream)))
    with pytest.raises(ValueError, match=r"^'.*0\.tar' is not a readable tar file"):
        list(itertools.islice(loader_of(stream, num_workers=2), 2))


def test_a_shuffled_resume_reads_its_block_and_no_more():
    read = []

    def watched(row):
        read.append(row["image"])
        return row

    rows = IterableDataset.from_generator(rows_of_shards, gen_kwargs={"shards": [(0, 1000)], "captions": 1})
    stream = as_pairs(rows.map(watched))
    read.clear()
    _, states, _ = first_batches(loader_of(stream, batch_size=10, shuffle_buffer=50), 72)
    assert len(read) <= 720 + 50 + 2  # never more than a block ahead
    resumed = loader_of(stream, batch_size=10, shuffle_buffer=50)
    resumed.load_state_dict(json.loads(states[72]))
    read.clear()
    next(iter(resumed))
    assert read[0] == "0/700" and len(read) <= 50 + 20 + 10 + 2


def test_a_new_process_goes_on_with_real_batches(tmp_path):
    loader = real_loader()
    whole = first_batches(loader, 9)[0]
    first = real_loader()
    first_batches(first, 4)
    (tmp_path / "state.json").write_text(json.dumps(first.state_dict()))
    assert exit_code_of(write_rest, tmp_path / "state.json", 5, tmp_path / "rest.pt") == 0
    rest = torch.load(tmp_path / "rest.pt")
    assert len(rest) == 5 and {"pixel_values", "input_ids", "sample_id"} <= rest[0].keys()
    for batch, expected in zip(rest, whole[4:], strict=True):
        assert batch.keys() == expected.keys() and all(torch.equal(batch[name], expected[name]) for name in batch)
