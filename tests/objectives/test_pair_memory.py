"""The memory of trusted pairs: who is in it, and what it finds."""

import torch
import torch.nn.functional as F

from hf_dissect.objectives.pair_memory import PairMemory


def add(memory: PairMemory, ids: list[int], captions, images, trust=None, image_keys=None, trusted=None) -> None:
    trust = torch.ones(len(ids)) if trust is None else torch.tensor(trust)
    keys = torch.tensor([ids, [100 + number for number in ids] if image_keys is None else image_keys])
    memory.add(captions, images, trust, keys, torch.tensor([True] * len(ids) if trusted is None else trusted))


def ids_of(memory: PairMemory) -> list[int]:
    state = memory.state_dict()
    return sorted(state["keys"][0][state["trust"] > 0].tolist())


def vectors(*directions: int, size: int = 4) -> torch.Tensor:
    return F.one_hot(torch.tensor(directions), size).float()


def test_the_latest_trusted_pairs_stay_and_each_pair_is_there_once():
    memory = PairMemory(4)
    add(memory, [1, 2, 3], torch.eye(4)[:3], torch.eye(3), trusted=[True, False, True])
    assert ids_of(memory) == [1, 3]
    add(memory, [4, 5, 6], torch.eye(4)[:3], torch.eye(3))
    assert ids_of(memory) == [3, 4, 5, 6]  # 1 was the oldest
    add(memory, [5, 7], torch.eye(4)[:2], torch.eye(3)[:2], trusted=[False, True])
    assert ids_of(memory) == [4, 6, 7]  # 5 was seen again, and is not trusted any more
    add(memory, [7], torch.eye(4)[3:], torch.eye(3)[:1])
    assert ids_of(memory).count(7) == 1 and memory.count == len(ids_of(memory))
    add(memory, list(range(20, 30)), torch.eye(4)[[0] * 10], torch.eye(3)[[0] * 10])
    assert ids_of(memory) == [26, 27, 28, 29]


def test_a_caption_finds_the_image_that_its_neighbours_share():
    """Two topics with two pairs each; the mean image is 1, 1, 0."""
    memory = PairMemory(8)
    captions = F.normalize(torch.tensor([[1.0, 0.1, 0, 0], [1, -0.1, 0, 0], [0, 0, 1, 0.1], [0, 0, 1, -0.1]]), dim=1)
    images = torch.tensor([[2.0, 0.0, 1.0], [2.0, 0.0, -1.0], [0.0, 2.0, 1.0], [0.0, 2.0, -1.0]])
    add(memory, [1, 2, 3, 4], captions, images, trust=[0.9, 0.9, 0.8, 0.8])
    asked = torch.tensor([[1.0, 0, 0, 0], [0, 0, 1.0, 0]])
    found = memory.find_images(asked, torch.tensor([[50, 51], [60, 61]]), 2)
    expected = F.normalize(torch.tensor([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0]]), dim=1)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(memory.find_captions(found, torch.tensor([[50, 51], [60, 61]]), 2), asked)


def test_the_pair_itself_and_its_image_do_not_count():
    memory = PairMemory(8)
    add(memory, [1, 2, 3], vectors(0, 0, 1), torch.tensor([[1.0, 0], [0, 1.0], [-1, -1]]), image_keys=[7, 8, 9])
    of_others = memory.find_images(vectors(0, 0, 0), torch.tensor([[1, 40, 41], [7, 8, 42]]), 1)
    centred = memory.center(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    torch.testing.assert_close(of_others[:2], centred)  # 1 finds 2; a pair with the image of 2 finds 1
    nothing = memory.find_images(vectors(0), torch.tensor([[1], [9]]), 3)
    torch.testing.assert_close(nothing, centred[:1])  # of three, one is left


def test_nothing_is_found_where_nothing_is_left():
    memory = PairMemory(4)
    add(memory, [1], vectors(0), torch.tensor([[1.0, 0]]))
    assert not memory.find_images(vectors(0), torch.tensor([[1], [101]]), 2).any()


def test_a_hub_that_is_there_often_counts_once_for_each_pair_and_by_its_trust():
    memory = PairMemory(8)
    images = torch.tensor([[3.0, 0, 0], [0, 3.0, 0], [0, 0, 3.0]])
    add(memory, [1, 2, 3], vectors(0, 0, 1), images, trust=[0.9, 0.72, 0.9])
    for _ in range(3):
        add(memory, [1], vectors(0), images[:1], trust=[0.9])
    found = memory.find_images(vectors(0), torch.tensor([[50], [60]]), 2)
    mean = images.mean(0)
    centred = F.normalize(images[:2] - mean, dim=1)
    torch.testing.assert_close(found, F.normalize(0.9 * centred[:1] + 0.72 * centred[1:], dim=1))


def test_a_saved_memory_goes_on_and_fits_another_size():
    torch.manual_seed(0)
    memory, whole = PairMemory(5), PairMemory(5)
    batches = [(range(4 * n, 4 * n + 4), F.normalize(torch.randn(4, 6), dim=1), torch.randn(4, 3)) for n in range(4)]
    for ids, captions, images in batches[:2]:
        add(memory, list(ids), captions, images)
    for size, kept in ((5, [13, 14, 15]), (3, [13, 14, 15]), (20, list(range(3, 16)))):
        resumed = PairMemory(size)
        resumed.load_state_dict(memory.state_dict())
        for ids, captions, images in batches[2:]:
            add(resumed, list(ids), captions, images)
        assert set(kept) <= set(ids_of(resumed)) and memory.count == 5
    for ids, captions, images in batches:
        add(whole, list(ids), captions, images)
    resumed = PairMemory(5)
    resumed.load_state_dict(memory.state_dict())
    for ids, captions, images in batches[2:]:
        add(resumed, list(ids), captions, images)
    asked = F.normalize(torch.randn(3, 6), dim=1), torch.tensor([[50, 51, 52], [60, 61, 62]]), 2
    torch.testing.assert_close(resumed.find_images(*asked), whole.find_images(*asked))
