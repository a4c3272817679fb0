"""The task-wise decorrelation loss against the double loop of its definition, alone, over processes and under DDP."""

import math

import pytest
import torch
import torch.distributed as dist
from testing.launched import on_ranks
from testing.tiny_bases import adapted, pictures, tiny_vit
from testing.tiny_models import CAPTIONS, tiny_clip, tiny_inputs
from torch.nn.parallel import DistributedDataParallel

from hf_dissect.mola import decorrelation_loss, mola_routing

ROWS, DIM = 8, 5
TASKS = torch.tensor([0, 1, 2, 0, 1, 1, 0, 7])


def double_loop(z: torch.Tensor, tasks: list[int], temperature: float) -> torch.Tensor:
    rows = [row / row.square().sum().sqrt() for row in z]
    terms = []
    for i in range(len(rows)):
        for j in range(len(rows)):
            if i != j and tasks[i] == tasks[j]:
                others = [(rows[i] @ rows[k] / temperature).exp() for k in range(len(rows)) if k != i]
                terms.append(-((rows[i] @ rows[j] / temperature).exp() / sum(others)).log())
    return sum(terms) / len(terms)


def embeddings(seed: int = 0, rows: int = ROWS, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(rows, DIM, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 3


MIXES = [
    [0, 0],
    [0, 1, 0],
    [1, 1, 1, 1],
    [0, 1, 2, 0, 1, 1],
    [5, 5, -3, -3, 0, 9, 5],
    [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 6],
]


@pytest.mark.parametrize("temperature", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("tasks", MIXES, ids=str)
def test_it_equals_the_double_loop(tasks, temperature):
    z = embeddings(rows=len(tasks)).requires_grad_()
    found, expected = decorrelation_loss(z, torch.tensor(tasks), temperature), double_loop(z, tasks, temperature)
    assert (found - expected).abs() < 1e-10
    one, other = torch.autograd.grad(found, z)[0], torch.autograd.grad(expected, z)[0]
    assert (one - other).abs().max() < 1e-10


def test_it_is_lower_when_tasks_are_routed_apart():
    tasks = torch.tensor([0, 0, 1, 1])
    apart = torch.tensor([[1.0, 0], [1, 0], [-1, 0], [-1, 0]])
    assert decorrelation_loss(apart, tasks) < decorrelation_loss(apart[[0, 2, 0, 2]], tasks)
    # Each row: its pair at cosine 1, two others at cosine -1.
    assert decorrelation_loss(apart, tasks).item() == pytest.approx(math.log(1 + 2 * math.exp(-2)), abs=1e-6)


@pytest.mark.parametrize("tasks", [[3], [0, 1], [2, 0, 1, 7]], ids=str)
def test_without_two_samples_of_a_task_it_is_zero_with_gradient_zero(tasks):
    z = embeddings(rows=len(tasks)).requires_grad_()
    loss = decorrelation_loss(z, torch.tensor(tasks))
    assert loss.item() == 0 and loss.dim() == 0
    loss.backward()
    assert torch.equal(z.grad, torch.zeros_like(z))


@pytest.mark.parametrize("temperature", [1e-3, 1.0])
def test_extreme_embeddings_give_no_nan(temperature):
    z = torch.cat([torch.zeros(2, DIM), torch.full((2, DIM), 1e-30), torch.full((2, DIM), 1e18)]).requires_grad_()
    loss = decorrelation_loss(z, torch.tensor([0, 1, 0, 1, 0, 1]), temperature)
    loss.backward()
    assert loss.isfinite() and z.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype):
    z = embeddings(dtype=torch.float32).to(dtype)
    loss = decorrelation_loss(z, TASKS, 0.5)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(double_loop(z.double(), TASKS.tolist(), 0.5).item(), abs=1e-4)


@pytest.mark.parametrize("shape", [(4,), (3, DIM), (4, DIM, 1)])
def test_shapes_that_do_not_fit_are_refused(shape):
    with pytest.raises(ValueError, match=r"task_ids of shape \(4,\): must be \(b, d\) and \(b,\)"):
        decorrelation_loss(torch.zeros(shape), TASKS[:4])


# ---- of a model ----


def test_the_loss_of_a_model_is_that_of_its_projected_scores():
    model = adapted(tiny_vit().double(), decorrelation_weight=0.3, decorrelation_temperature=0.5, decorrelation_dim=6)
    batch, tasks = pictures(6, dtype=torch.float64), [0, 1, 1, 0, 2, 1]
    model(**batch)
    router = mola_routing(model).mola_router["default"]
    projection = router.branches["model"](batch["pixel_values"]) @ router.projection.weight.T
    assert projection.shape == (6, 6)
    found = mola_routing(model).decorrelation_loss(torch.tensor(tasks))
    assert (found - 0.3 * double_loop(projection, tasks, 0.5)).abs() < 1e-10
    found.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in router.parameters() if parameter.requires_grad)


def test_the_towers_of_a_dual_encoder_count_equally():
    base, processor = tiny_clip()
    inputs = tiny_inputs(base, processor, CAPTIONS[:4])
    model, tasks = adapted(base, router_input="embeddings"), [0, 1, 1, 0]
    found = []
    model(**inputs)
    router = mola_routing(model).mola_router["default"]
    for branch in router.branches.values():
        branch.register_forward_hook(lambda module, args, scores: found.append(scores))
    model(**inputs)
    assert len(found) == 2
    expected = sum(0.1 * double_loop(router.projection(scores), tasks, 1.0) for scores in found) / 2
    assert torch.allclose(mola_routing(model).decorrelation_loss(torch.tensor(tasks)), expected, atol=1e-6)


# ---- several processes ----


def union_loss_and_gradient(rows: slice, temperature: float, tasks: torch.Tensor) -> list[torch.Tensor]:
    matrix = embeddings(9, rows=DIM).requires_grad_()
    loss = decorrelation_loss(embeddings()[rows] @ matrix, tasks[rows], temperature)
    loss.backward()
    return [loss.detach(), matrix.grad]


TASK_MIXES = [TASKS, torch.arange(ROWS), torch.arange(ROWS) % 2, torch.arange(ROWS) // 4 * 3]


def router_model(kind: str, decorrelation: bool):
    if kind == "clip":
        base, processor = tiny_clip()
        inputs = tiny_inputs(base, processor, CAPTIONS[:4])
        fields = {"router_input": "embeddings"}
    else:
        base, inputs, fields = tiny_vit(), pictures(4), {}
    fields |= {"decorrelation_weight": 0.2 if decorrelation else 0.0}
    return adapted(base.double(), **fields).train(), inputs


def ddp_gradients(rank: int, kind: str, decorrelation: bool, **options) -> dict[str, torch.Tensor]:
    """Of two steps; the second one would fail where a parameter got no gradient in the first."""
    model, inputs = router_model(kind, decorrelation)
    inputs = {name: v.double() if v.is_floating_point() else v for name, v in inputs.items()}
    share = {name: value[2 * rank : 2 * rank + 2] for name, value in inputs.items()}
    tasks = torch.tensor([0, 1, 0, 1])[2 * rank : 2 * rank + 2]
    wrapped = DistributedDataParallel(model, **options)
    for _ in range(2):
        model.zero_grad()
        outputs = wrapped(**share, task_ids=tasks)
        loss = (outputs["logits_per_image"] if kind == "clip" else outputs["last_hidden_state"]).square().mean()
        if decorrelation:
            loss = loss + mola_routing(wrapped).decorrelation_loss(tasks)
        loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


DDP_CASES = [
    (kind, decorrelation, unused) for kind in ("clip", "vit") for decorrelation in (True, False) for unused in (0, 1)
]


def compute_on_rank() -> dict:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    found = {}
    share = ROWS // world_size
    for number, tasks in enumerate(TASK_MIXES):
        for temperature in (0.2, 1.0):
            parts = union_loss_and_gradient(slice(rank * share, (rank + 1) * share), temperature, tasks)
            for part in parts:
                dist.all_reduce(part)
            found[number, temperature] = [part / world_size for part in parts]
    if world_size == 2:
        for kind, decorrelation, unused in DDP_CASES:
            gradients = ddp_gradients(rank, kind, decorrelation, find_unused_parameters=bool(unused))
            flat = torch.cat([gradient.flatten() for gradient in gradients.values()])
            both = [torch.empty_like(flat) for _ in range(2)]
            dist.all_gather(both, flat)
            found[kind, decorrelation, unused] = (list(gradients), both)
    return found


@pytest.fixture(scope="module")
def of_processes(tmp_path_factory):
    """What two and four processes found."""
    return on_ranks([2, 4], tmp_path_factory.mktemp("ranks"), compute_on_rank)


@pytest.mark.parametrize("temperature", [0.2, 1.0])
@pytest.mark.parametrize("mix", range(len(TASK_MIXES)))
@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_agree_with_one_process_on_the_union(of_processes, world_size, mix, temperature):
    expected = union_loss_and_gradient(slice(None), temperature, TASK_MIXES[mix])
    for one, many in zip(expected, of_processes[world_size][mix, temperature], strict=True):
        assert (one - many).abs().max() < 1e-10


@pytest.mark.parametrize(("kind", "decorrelation", "unused"), DDP_CASES)
def test_a_router_trains_under_ddp(of_processes, kind, decorrelation, unused):
    names, (first, second) = of_processes[2][kind, decorrelation, unused]
    assert torch.equal(first, second) and first.isfinite().all() and first.abs().sum() > 0
    assert any("mola_router" in name for name in names)
    assert any("projection" in name for name in names) == decorrelation
