"""Choosing among the candidates of all ranks, and sharing out what is kept."""

import pytest
import torch
from testing.launched import on_ranks
from testing.scope_ranks import check_choices

from hf_dissect.selection.scope import plan_moves


@pytest.mark.parametrize("counts", [[4, 4], [8, 0], [0, 3, 9, 0], [1, 5, 2, 4], [0, 0, 0], [5, 3, 4, 4, 0, 8]])
def test_moves_end_in_equal_numbers_with_as_few_pairs_as_can_be(counts):
    plans = [plan_moves(counts, rank) for rank in range(len(counts))]
    moves, share = torch.tensor([sent for sent, _ in plans]), sum(counts) // len(counts)
    assert torch.tensor([received for _, received in plans]).T.equal(moves)  # sender and receiver agree
    after = torch.tensor(counts) - moves.sum(1) + moves.sum(0)
    assert after.tolist() == [share] * len(counts) and (moves >= 0).all() and moves.diagonal().sum() == 0
    assert moves.sum() == sum(max(0, count - share) for count in counts)


def test_three_ranks_choose_what_one_would(tmp_path):
    on_ranks([3], tmp_path, check_choices)
