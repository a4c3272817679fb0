"""Mean weights of experts by task, and how far apart those of two tasks are."""

import math
from contextlib import nullcontext

import pytest
import torch
from testing import tiny_models

from hf_dissect.evaluation.expert_weights import (
    MAX_TASKS,
    RoutedPairs,
    average_by_task,
    has_router,
    list_tasks,
    read_expert_weights,
    route_pairs,
)

ONE, TWO, THREE = [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.5, 0.25, 0.25]


def routed(*rows, **more) -> RoutedPairs:
    """Pairs of `(task, weights)`."""
    return RoutedPairs({"image": torch.tensor([weights for _, weights in rows])}, [task for task, _ in rows], **more)


def test_means_and_distances_are_those_of_the_formula():
    entry = average_by_task([routed(("b", ONE), ("a", TWO), ("b", THREE)), routed(("c", THREE), unreadable=2)])
    assert entry["tasks"] == ["a", "b", "c"] and entry["pairs_by_task"] == [1, 2, 1]
    assert (entry["pairs"], entry["unreadable"], entry["further_tasks"]) == (4, 2, 0)
    figures = entry["towers"]["image"]
    assert figures["weights"] == [TWO, [0.75, 0.125, 0.125], THREE]
    # a and b: (0.75 + 0.875 + 0.125) / 2, a and c: (0.5 + 0.75 + 0.25) / 2, b and c: (0.25 + 0.125 + 0.125) / 2
    assert figures["distance"] == pytest.approx((0.875 + 0.75 + 0.25) / 3, abs=1e-6)


@pytest.mark.parametrize("num_tasks", [2, 5])
def test_the_distance_is_0_for_tasks_alike_and_1_where_none_share_an_expert(num_tasks):
    identity = torch.eye(num_tasks).tolist()
    alike = average_by_task([routed(*((task, identity[1]) for task in range(num_tasks)))])["towers"]["image"]
    assert alike["distance"] == alike["distance_by_chance"] == 0
    apart = average_by_task([routed(*((task, identity[task]) for task in range(num_tasks)))])["towers"]["image"]
    assert apart["distance"] == 1 and apart["weights"] == identity


def test_shuffled_tasks_give_the_distance_of_chance():
    torch.manual_seed(0)
    weights = torch.randn(4000, 4).softmax(1)
    tasks = (torch.arange(4000) % 2).tolist()
    by_chance = average_by_task([RoutedPairs({"image": weights}, tasks)])["towers"]["image"]
    assert 0 < by_chance["distance_by_chance"] < 0.05 and by_chance["distance"] < 0.05
    apart = torch.cat([torch.tensor([[0.9, 0.1], [0.1, 0.9]])] * 50)
    figures = average_by_task([RoutedPairs({"image": apart}, tasks[:100])])["towers"]["image"]
    assert figures["distance"] == pytest.approx(0.8) and figures["distance_by_chance"] < 0.25


def test_a_weight_that_is_not_finite_makes_its_row_and_the_distances_unknown():
    entry = average_by_task([routed((0, ONE), (1, [math.nan, 0.5, 0.5]), (1, TWO), (7, [math.inf, 0.0, 0.0]))])
    figures = entry["towers"]["image"]
    assert figures["weights"] == [ONE, [None, 0.75, 0.25], [None, 0.0, 0.0]]
    assert figures["distance"] is None and figures["distance_by_chance"] is None


def test_tasks_that_are_known_without_pairs_and_pairs_without_tasks_have_rows():
    entry = average_by_task([routed(("a", ONE), (None, TWO), (3, THREE))], ["z", "a"])
    assert entry["tasks"] == ["z", "a", 3, None] and entry["pairs_by_task"] == [0, 1, 1, 1]
    assert entry["towers"]["image"]["weights"] == [[None] * 3, ONE, THREE, TWO]
    assert 0 < entry["towers"]["image"]["distance"] < 1
    assert average_by_task([RoutedPairs({}, [])]) == average_by_task([])
    nothing = average_by_task([RoutedPairs({"image": torch.zeros(0, 3)}, [], unreadable=4)], ["a"])
    assert nothing["pairs"] == 0 and nothing["unreadable"] == 4
    assert nothing["towers"]["image"] == {"weights": [[None] * 3], "distance": None, "distance_by_chance": None}


def test_of_many_tasks_those_with_most_pairs_are_kept_in_their_order():
    rows = [(task, ONE if task % 2 else TWO) for task in range(100) for _ in range(2 if task >= 70 else 1)]
    entry = average_by_task([routed(*rows)])
    assert entry["tasks"] == [*range(MAX_TASKS - 30), *range(70, 100)] and entry["further_tasks"] == 100 - MAX_TASKS
    # Half of the tasks have one expert and half the other, so of 4950 pairs of tasks 2500 are apart.
    assert entry["towers"]["image"]["distance"] == pytest.approx(2500 / 4950, abs=1e-6)


def test_weights_of_an_earlier_pass_are_not_read():
    """A compiled model may keep no record of its weights; those of a pass before it must not stand in for them."""
    model, processor = tiny_models.tiny_clip()
    model = tiny_models.with_mola(model, "router", router_input="embeddings", init_weights=False).eval()
    inputs = tiny_models.tiny_inputs(model.get_base_model(), processor, tiny_models.CAPTIONS[:4])
    others = {name: values.flip(0) for name, values in inputs.items()}
    with torch.no_grad():
        model(**others)
        expected = read_expert_weights(model)
        model(**inputs)
    batch = others | {"sample_id": torch.arange(4), "task_id": torch.arange(4)}
    calls = {"prepare": dict, "autocast": nullcontext, "gather": dict}
    for called in (model, torch.compile(model, backend="eager")):
        part = route_pairs(called, [batch], **calls)
        assert part.tasks == [0, 1, 2, 3] and part.unreadable == 0
        if called is model or part.weights:
            assert all(torch.equal(part.weights[tower], weights) for tower, weights in expected.items())


def test_only_an_active_router_counts():
    model, _ = tiny_models.tiny_clip()
    assert not has_router(model)
    model = tiny_models.with_mola(model, "router")
    assert has_router(tiny_models.Wrapper(model))
    with model.disable_adapter():
        assert not has_router(model)
    assert not has_router(tiny_models.with_mola(tiny_models.tiny_clip()[0], "grad"))
    assert list_tasks(model) == []
