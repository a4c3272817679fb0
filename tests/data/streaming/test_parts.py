"""All parts of a stream together give each pair once a pass, however many shards and rows there are."""

import itertools
from collections import Counter

import pytest
from testing.tiny_streams import all_captions, captions_of, first_batches, loader_of, one_pass, stream_of


@pytest.mark.parametrize("seed", [None, (7, 0)])
@pytest.mark.parametrize("num_parts", [1, 2, 3, 4, 6, 7, 16])
def test_each_pair_falls_to_one_part_in_each_pass(num_parts, seed):
    stream = stream_of((5, 2, 9, 1), captions=2)
    passes = [one_pass(stream, num_parts, number, seed) for number in range(3)]
    for captions in passes:
        assert sorted(captions) == all_captions(stream)
    if seed is None and num_parts == 1:
        assert passes[0] == passes[1] == [pair["caption"] for pair in stream]
    if seed is not None:
        assert passes[0] != passes[1] != passes[2]


def test_ranks_and_workers_share_a_pass():
    stream = stream_of((5, 2, 9, 1, 3, 3, 3))
    first_pass = Counter()
    for rank in range(2):
        loader = loader_of(stream, batch_size=1, rank=rank, world_size=2, num_workers=2, shuffle_buffer=3)
        for batch in loader:
            state = loader.state_dict()
            if state["workers"][state["turn"] - 1]["last_pass"] == 0:
                first_pass.update(captions_of(batch))
            if loader.passes:
                break
    assert first_pass == Counter(all_captions(stream))


def test_shares_go_round_so_that_no_shard_is_seen_less_often():
    stream = stream_of((30, 10))
    seen = Counter(itertools.chain.from_iterable(map(captions_of, first_batches(loader_of(stream, 5), 16)[0])))
    assert set(seen.values()) == {2}
    seen = Counter()
    for rank in range(2):
        loader = loader_of(stream, batch_size=5, rank=rank, world_size=2)
        seen.update(itertools.chain.from_iterable(map(captions_of, first_batches(loader, 16)[0])))
    assert len(seen) == 40 and set(seen.values()) == {4}


def test_more_parts_than_rows():
    stream = stream_of((1, 1))
    for workers in (0, 3):
        for rank in range(2):
            loader = loader_of(stream, rank=rank, world_size=2, num_workers=workers, shuffle_buffer=2)
            batches, _, passes = first_batches(loader, 6)
            assert {caption for batch in batches for caption in captions_of(batch)} <= {"0/0/0", "1/0/0"}
            assert passes[-1] >= 2
