"""The order of a stream's batches, and what else may happen to them."""

import itertools
import multiprocessing
import os
import signal

import pytest
import torch
from datasets.distributed import split_dataset_by_node
from testing.tiny_streams import all_captions, captions_of, first_batches, loader_of, stream_of

from hf_dissect.data.pairs import as_pairs
from hf_dissect.data.streaming.loader import StreamLoader

# ---- order ----


def test_the_order_is_new_in_each_pass_and_mixes_blocks_and_shards():
    stream = stream_of((40, 40), captions=1)
    loader = loader_of(stream, batch_size=10, shuffle_buffer=20)
    captions = [caption for batch in first_batches(loader, 48)[0] for caption in captions_of(batch)]
    passes = [captions[start : start + 80] for start in range(0, 480, 80)]
    assert all(sorted(each) == all_captions(stream) for each in passes)
    assert len(set(map(tuple, passes))) == 6 and len({each[0][:2] for each in passes}) == 2
    for each in passes:
        rows = [int(caption.split("/")[1]) for caption in each]
        blocks = [rows[start : start + 20] for start in range(0, 80, 20)]
        assert [sorted(block) for block in blocks] == [list(range(20)), list(range(20, 40))] * 2
        assert len(set(map(tuple, blocks))) == 4
    again = loader_of(stream, batch_size=10, shuffle_buffer=20, seed=1)
    assert [caption for batch in first_batches(again, 48)[0] for caption in captions_of(batch)] != captions


def test_without_a_buffer_the_order_is_that_of_the_data():
    stream = stream_of()
    batches, _, passes = first_batches(loader_of(stream, batch_size=7), 6)
    captions = [caption for batch in batches for caption in captions_of(batch)]
    assert captions == [pair["caption"] for pair in stream] * 2 and passes == [0, 0, 0, 0, 1, 1, 1]


def test_the_streams_own_shuffle_is_told(caplog):
    rows = stream_of((20, 20)).rows.shuffle(seed=1, buffer_size=10)
    loader = loader_of(as_pairs(rows), batch_size=10)
    assert "shuffle buffer of its own, which a resumed run finds empty" in caplog.text
    captions = [caption for batch in first_batches(loader, 8)[0] for caption in captions_of(batch)]
    assert sorted(captions[:40]) == sorted(captions[40:]) and captions[:40] != captions[40:]


# ---- what else may happen ----


@pytest.mark.parametrize(
    ("setting", "value", "told"),
    [
        ("world_size", 3, "world_size 1, which is now 3"),
        ("num_workers", 2, "num_workers 0, which is now 2"),
        ("batch_size", 2, "batch_size 3, which is now 2"),
        ("shuffle_buffer", 7, "shuffle_buffer 4, which is now 7"),
    ],
)
def test_other_settings_begin_the_pass_anew(caplog, setting, value, told):
    settings = {"batch_size": 3, "shuffle_buffer": 4}
    loader = loader_of(stream_of(), **settings)
    first_batches(loader, 12)
    assert loader.passes == 1
    other = loader_of(stream_of(), **{**settings, setting: value})
    other.load_state_dict(loader.state_dict())
    assert f"was saved with {told}: pass 1 over the data starts anew" in caplog.text and other.passes == 1
    again = loader_of(stream_of(), **{**settings, setting: value})
    again.load_state_dict(other.state_dict())  # a restart is part of the place
    assert again.state_dict()["restarts"] == 1
    batches, _, passes = first_batches(other, 10)
    assert [captions_of(batch) for batch in batches] == [captions_of(batch) for batch in first_batches(again, 10)[0]]
    assert passes == sorted(passes) and passes[0] == 1
    fresh = loader_of(stream_of(), **{**settings, setting: value})
    assert [captions_of(batch) for batch in first_batches(fresh, 10)[0]] != [captions_of(batch) for batch in batches]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_without_rows_is_told(workers):
    with pytest.raises(
        ValueError, match="^The data set has no rows; check the path, the split and any filter"
    ) as told:
        next(iter(loader_of(stream_of((0, 0, 0)), num_workers=workers, world_size=2)))
    assert not multiprocessing.active_children(), f"workers are left while {told.value} is looked at"


def test_a_stream_that_is_split_already_is_refused():
    rows = split_dataset_by_node(stream_of().rows, rank=0, world_size=2)
    with pytest.raises(ValueError, match="split over 2 processes already"):
        loader_of(as_pairs(rows))


def test_the_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    for workers in (0, 2):
        first_batches(loader_of(stream_of(), num_workers=workers, shuffle_buffer=4), 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_batches_that_are_given_out_are_not_held():
    loader = loader_of(stream_of(), num_workers=2, shuffle_buffer=4)
    batches = iter(loader)
    counts = []
    for _ in range(40):
        next(batches)
        counts.append(len(os.listdir("/proc/self/fd")))
    assert max(counts[20:]) <= max(counts[4:20]) + 2


def collate_twice_then_die(pairs):
    if pairs[0]["caption"].startswith("3/"):
        os.kill(os.getpid(), signal.SIGKILL)
    return {"sample_id": torch.tensor([pair["sample_id"] for pair in pairs])}


def test_a_worker_that_dies_is_told():
    # One batch ahead at most: a batch that waits in the queue of a dead worker is lost in another way.
    loader = StreamLoader(stream_of(), collate_twice_then_die, 3, num_workers=1, prefetch_factor=1)
    with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid.*(killed by signal|exited unexpectedly)"):
        list(itertools.islice(loader, 10))
