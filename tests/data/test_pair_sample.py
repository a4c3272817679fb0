"""A sample of pairs is random, the same each time, and made of the pairs as they are."""

import numpy as np
import pytest
import torch
from testing.tiny_models import tiny_pairs

from hf_dissect.data import as_pairs
from hf_dissect.data.pair_sample import sample_pairs


@pytest.mark.parametrize("captions", [1, 3])
def test_pairs_of_a_sample_are_those_of_the_data(captions):
    rows = tiny_pairs(20, captions_per_image=captions, noisy=5).add_column("task", [i % 3 for i in range(20)])
    pairs = as_pairs(rows, task="task")
    sample = sample_pairs(pairs, 11)
    ids = [sample[index]["sample_id"] for index in range(len(sample))]
    assert len(sample) == len(set(ids)) == 11 and ids == sorted(ids) and max(ids) > 11
    for index, number in enumerate(ids):
        assert sample[index] == pairs[number] and sample.find(number) == index
    assert sample.knows_truth and sample.num_samples is None and len(pairs) == 20 * captions
    again = sample_pairs(as_pairs(rows, task="task"), 11)
    assert [pair["sample_id"] for pair in again.__getitems__(range(11))] == ids


def test_ids_of_a_column_stay_with_their_pairs():
    pairs = as_pairs(tiny_pairs(9).add_column("key", [f"p{i}" for i in range(9)]), sample_id="key")
    pairs.find(pairs[4]["sample_id"])  # fills what is kept of the order of the ids
    sample = sample_pairs(pairs, 4)
    assert {sample[i]["sample_id"] for i in range(4)} <= set(pairs.sample_ids.tolist())
    assert all(sample.find(sample[i]["sample_id"]) == i for i in range(4))


def test_small_data_and_no_limit_are_left_as_they_are():
    pairs = as_pairs(tiny_pairs(8))
    assert sample_pairs(pairs, None) is pairs and sample_pairs(pairs, 8) is pairs and sample_pairs(pairs, 99) is pairs


def test_torch_data_and_streams_are_sampled():
    class Own(torch.utils.data.Dataset):
        def __len__(self):
            return 10

        def __getitem__(self, index):
            return {"image": None, "caption": str(index), "sample_id": index}

    assert len(sample_pairs(Own(), 4)) == 4
    stream = as_pairs(tiny_pairs(10).to_iterable_dataset())
    assert len(list(sample_pairs(stream, 4))) == 4 and len(list(stream)) == 10


def test_every_pair_may_be_chosen():
    pairs = as_pairs(tiny_pairs(40))
    chosen = {pair["sample_id"] for pair in sample_pairs(pairs, 20).__getitems__(range(20))}
    assert len(chosen & set(range(20))) not in (0, 20)  # of both halves
    assert np.isin(list(chosen), np.arange(40)).all()
