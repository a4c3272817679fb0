"""Balanced streams: visits of a pair follow from its id, no batch holds a pair twice, and a resume goes on exactly."""

import itertools
import json
import math

import numpy as np
import pytest
from datasets import Features, IterableDataset, Value
from testing import tiny_streams

from hf_dissect.data.pairs import as_pairs
from hf_dissect.data.sampling_file import SamplingWeights
from hf_dissect.data.streaming.loader import StreamLoader
from hf_dissect.data.streaming.parts import Place, StreamPart
from hf_dissect.data.streaming.stream_balance import StreamBalance

WEIGHTS = {"large": 0.4, "small": 2.7, "7": 1.0}
FEATURES = Features({name: Value("string") for name in ("image", "caption", "key", "cluster")})


def rows_of(shards):
    for shard in shards:
        for row in range(10):
            number = 10 * shard + row
            cluster = ("small", None, "7")[number % 3] if number % 4 == 0 else "large"
            yield {"image": "i", "caption": str(number), "key": f"k{number}", "cluster": cluster}


def stream_of(weights=WEIGHTS, column="cluster", max_visits=8, shards=6, seed=0):
    rows = IterableDataset.from_generator(rows_of, features=FEATURES, gen_kwargs={"shards": list(range(shards))})
    stream = as_pairs(rows, sample_id="key", balance="cluster")
    if weights is not None:
        stream.balance = StreamBalance(SamplingWeights("w", weights, None, None), column, max_visits, seed)
    return stream


def loader_of(stream, batch_size=4, **settings) -> StreamLoader:
    return StreamLoader(stream, tiny_streams.LoggingCollator(), batch_size, **settings)


def read_passes(stream, num_parts, passes):
    """Number of visits of each caption in some passes by all parts."""
    counts = {}
    for part in range(num_parts):
        placed = StreamPart(stream, part, num_parts, (0,)).read(Place())
        for place, pair in itertools.takewhile(lambda one: one[0].pass_number < passes, placed):
            counts.setdefault(pair["caption"], [0] * passes)[place.pass_number] += 1
    return counts


def test_visits_are_their_expectation_rounded_and_the_same_for_any_number_of_parts():
    counts = read_passes(stream_of(), 1, 6)
    for row in rows_of(range(6)):
        weight = WEIGHTS.get(row["cluster"], 1.0)
        visits = np.cumsum(counts.get(row["caption"], [0] * 6))
        for number, total in enumerate(visits, start=1):
            assert math.floor(number * weight) <= total <= math.ceil(number * weight), (row, visits)
    assert len({tuple(one) for one in counts.values()}) > 5, "pairs of a cluster take turns"
    for num_parts in (2, 3, 7):
        assert read_passes(stream_of(), num_parts, 6) == counts
    assert read_passes(stream_of(seed=1), 1, 6) != counts
    assert all(max(one) <= 2 for one in read_passes(stream_of(max_visits=2), 1, 6).values())


@pytest.mark.parametrize("shuffle_buffer", [0, 5, 30])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_no_batch_holds_a_pair_twice_and_nothing_is_lost(shuffle_buffer, num_workers):
    loader = loader_of(stream_of(), shuffle_buffer=shuffle_buffer, num_workers=num_workers)
    drawn = [tiny_streams.captions_of(batch) for batch in itertools.islice(loader, 40)]
    assert all(len(set(batch)) == 4 for batch in drawn)
    counts = read_passes(stream_of(), 1, 8)
    total = {caption: drawn_times for caption, drawn_times in _count(drawn).items()}
    for caption, times in total.items():  # up to the passes that were read in part
        assert times <= sum(counts[caption]) and times >= sum(counts[caption][: loader.passes]) - 4


def _count(batches):
    counts: dict[str, int] = {}
    for caption in itertools.chain(*batches):
        counts[caption] = counts.get(caption, 0) + 1
    return counts


@pytest.mark.parametrize("settings", [{}, {"shuffle_buffer": 7}, {"shuffle_buffer": 7, "num_workers": 2}])
def test_a_stopped_stream_goes_on_exactly(settings):
    # Fewer different pairs than would keep copies apart by chance, so that some always wait.
    weights = {"large": 3.3, "small": 7.5}
    whole, states, _ = tiny_streams.first_batches(loader_of(stream_of(weights, shards=2), **settings), 30)
    assert any('"copies": [{' in state for state in states)
    for stop in (1, 7, 16, 29):
        resumed = loader_of(stream_of(weights, shards=2), **settings)
        resumed.load_state_dict(json.loads(states[stop]))
        rest, new_states, _ = tiny_streams.first_batches(resumed, 30 - stop)
        assert [tiny_streams.captions_of(one) for one in rest] == [
            tiny_streams.captions_of(one) for one in whole[stop:]
        ]
        assert list(map(places_of, new_states)) == list(map(places_of, states[stop:]))


def places_of(state):
    """Places of the workers; the numbers of pairs that were looked up count those that were read ahead again."""
    return [{**worker, "looked_up": None} for worker in json.loads(state)["workers"]]


def test_fewer_different_pairs_than_a_batch_do_not_wait_for_ever():
    drawn = [tiny_streams.captions_of(batch) for batch in itertools.islice(loader_of(stream_of(shards=1), 16), 12)]
    assert all(len(batch) == 16 for batch in drawn)


def test_another_rule_begins_the_pass_again_with_a_warning(caplog):
    loader = loader_of(stream_of())
    next(iter(loader))
    state = json.loads(json.dumps(loader.state_dict()))
    loader_of(stream_of()).load_state_dict(state)
    assert not caplog.records
    loader_of(stream_of({"large": 1.0})).load_state_dict(state)
    assert "The place in the stream was saved with balance" in caplog.text


def test_unknown_pairs_count_once_are_reported_and_all_of_them_are_refused(caplog):
    loader = loader_of(stream_of({"small": 1.0}))
    list(itertools.islice(loader, 20))
    (record,) = [record for record in caplog.records if "lacks" in record.message]
    assert "lacks" in record.message and "each of them is visited once a pass" in record.message
    with pytest.raises(
        ValueError, match="'w' knows none of 60 pairs by their clusters .data.balance_column 'cluster'"
    ):
        list(itertools.islice(loader_of(stream_of({"other": 1.0})), 20))
    by_id = SamplingWeights("w", None, np.array([1]), np.array([2.0]))
    stream = stream_of(None)
    stream.balance = StreamBalance(by_id, None, 8, 0)
    with pytest.raises(ValueError, match="knows none of 60 pairs by their ids"):
        list(itertools.islice(loader_of(stream), 20))


def test_weights_of_nearly_nothing_end_with_a_reason():
    with pytest.raises(ValueError, match="passes over a part of the data visited no pair"):
        next(iter(loader_of(stream_of({"large": 1e-9, "small": 1e-9, "7": 0.0, None: 0.0}))))


def test_a_stream_without_balance_is_as_it_was():
    plain = stream_of(None)
    batches, states, _ = tiny_streams.first_batches(loader_of(plain, shuffle_buffer=7), 20)
    assert "copies" not in states[-1] and "looked_up" not in states[-1]
    assert sorted(itertools.chain(*map(tiny_streams.captions_of, batches[:15]))) == sorted(map(str, range(60)))
