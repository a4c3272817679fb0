import numpy as np
import pytest
import torch

from hf_dissect.selection.id_index import UNKNOWN, IdIndex


def random_ids(count: int, seed: int = 0) -> torch.Tensor:
    ids = np.random.default_rng(seed).choice(2**40, count, replace=False)
    return torch.from_numpy(ids) * 2**22 + 5


@pytest.mark.parametrize("batch", [1, 7, 100, 3000])
def test_every_id_keeps_its_slot_while_the_index_grows(batch):
    ids, index, expected = random_ids(9000), IdIndex(), {}
    ids = ids[: 40 * batch]
    for part in ids.split(batch):
        for place, slot in zip(part.tolist(), index.insert(part).tolist(), strict=True):
            assert expected.setdefault(place, slot) == slot
        assert index.find(ids).tolist() == [expected.get(place, UNKNOWN) for place in ids.tolist()]
    assert sorted(expected.values()) == list(range(len(ids))) and len(index) == len(ids)
    assert torch.equal(index.ids()[index.find(ids)], ids)


def test_a_batch_takes_over_only_as_many_positions_as_it_is_large():
    index, batch, taken_over, sizes = IdIndex(), 32, [0], []
    for part in random_ids(10_000).split(batch):
        index.insert(part)
        taken_over.append(index._num_moved if index._next_table is not None else 0)
        sizes.append(len(index._table))
    # Never more at once, whatever the size of the table, and always done before the table is half full.
    assert np.diff(taken_over).max() == 8 * batch and max(taken_over) > 8000
    assert sizes[-1] == 2**15 and all(2 * batch * step < size for step, size in enumerate(sizes))


def test_known_ids_help_to_take_over():
    ids, index = random_ids(400), IdIndex()
    index.insert(ids[:380])
    index.insert(ids[380:])  # now the table is three eighths full
    size = len(index._table)
    assert index._next_table is not None
    for _ in range(2):
        index.insert(ids[:100])
    assert len(index) == 400 and len(index._table) == 2 * size and index._next_table is None
    assert torch.equal(index.ids()[index.find(ids)], ids)


def test_a_batch_may_be_larger_than_all_before_and_repeat_ids():
    ids, index = random_ids(50_000), IdIndex()
    for size in (10, 600, 1100, 20_000, 50_000):
        slots = index.insert(torch.cat([ids[:size], ids[: size // 2]]))
        assert len(index) == size and torch.equal(slots[: size // 2], slots[size:])
    assert torch.equal(index.ids()[index.find(ids)], ids)


def test_given_ids_get_the_slots_of_their_order():
    ids = random_ids(5000)
    index = IdIndex.from_ids(ids)
    assert torch.equal(index.find(ids), torch.arange(5000)) and torch.equal(index.ids(), ids)
    more = index.insert(torch.tensor([3, ids[17].item(), 1]))
    assert more.tolist() == [5001, 17, 5000] and len(IdIndex.from_ids(ids[:0])) == 0


def test_what_was_asked_last_is_not_changed_by_who_asked():
    ids, index = random_ids(10), IdIndex()
    slots = index.insert(ids)
    slots.fill_(99)
    index.find(ids).fill_(77)
    assert torch.equal(index.ids()[index.find(ids)], ids)
    ids.add_(1)
    assert (index.find(ids) == UNKNOWN).all()
