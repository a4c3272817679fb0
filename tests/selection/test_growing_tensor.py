import numpy as np
import torch

from hf_dissect.selection import growing_tensor
from hf_dissect.selection.growing_tensor import SEGMENT, GrowingTensor


def test_values_are_found_and_changed_across_segments():
    tensor = GrowingTensor(np.float32)
    assert len(tensor) == 0 and tensor.whole().tolist() == []
    tensor.extend(torch.arange(5.0))
    assert tensor.whole().tolist() == [0, 1, 2, 3, 4]
    tensor.extend(torch.zeros(SEGMENT))
    tensor.extend(torch.tensor([7.0]))
    assert len(tensor) == SEGMENT + 6
    places = torch.tensor([SEGMENT + 5, 3, SEGMENT - 1, SEGMENT, 4])
    assert tensor[places].tolist() == [7, 3, 0, 0, 4] and tensor[places].dtype == torch.float32
    # Of a repeated place the last value stays.
    tensor[torch.tensor([SEGMENT, 2, SEGMENT - 1, SEGMENT, 2])] = torch.tensor([1.0, 2.5, 3.0, 4.0, 5.0])
    assert tensor[torch.tensor([SEGMENT - 1, SEGMENT, 2])].tolist() == [3, 4, 5]
    whole = tensor.whole()
    assert len(whole) == SEGMENT + 6 and torch.equal(whole[places], tensor[places])
    assert whole[[2, SEGMENT - 1, SEGMENT, SEGMENT + 1, SEGMENT + 5]].tolist() == [5, 3, 4, 0, 7]


def test_growing_leaves_in_place_what_is_there(monkeypatch):
    tensor, parts = GrowingTensor(np.int64), torch.arange(40).split(7)
    monkeypatch.setattr(growing_tensor, "SEGMENT", 16)
    monkeypatch.setattr(growing_tensor, "_SEGMENT_BITS", 4)
    addresses = []
    for part in parts:
        tensor.extend(part)
        addresses.append([segment.data_ptr() for segment in tensor._segments])
    assert addresses[-1][:1] == addresses[0] and len(addresses[-1]) == 3
    assert torch.equal(tensor.whole(), torch.arange(40)) and tensor[torch.tensor([39, 0, 16])].tolist() == [39, 0, 16]
