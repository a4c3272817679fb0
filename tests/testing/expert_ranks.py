"""Called by test_unused_experts.py in two processes: both must agree on the experts that no process uses."""

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel

from testing.tiny_bases import adapted, tiny_bert, tokens

TASKS = ([0, 0], [2, 2])  # of each process


def make(num_experts: int, **fields) -> nn.Module:
    settings = {"variant": "grad", "num_experts": num_experts, "r": 4, "init_weights": True}
    return adapted(tiny_bert(), **settings | fields).train()


def whole(value: torch.Tensor) -> torch.Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    rows = {}
    for name, parameter in model.named_parameters():
        if "mola_" in name:
            rows[name] = whole(parameter)
            for entry, value in optimizer.state.get(parameter, {}).items():
                if torch.is_tensor(value) and value.dim():
                    rows[f"{name} {entry}"] = whole(value)
    return rows


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[int]:
    return {
        e for name, value in before.items() for e in range(len(value)) if not torch.equal(value[e], after[name][e])
    }


def step(model: nn.Module, optimizer: torch.optim.Optimizer, tasks: list[int]) -> None:
    optimizer.zero_grad()
    output = model(**tokens(len(tasks)), task_ids=torch.tensor(tasks)).last_hidden_state
    (output * torch.linspace(-1, 1, output.numel()).reshape(output.shape)).sum().backward()
    optimizer.step()


def check_steps(model: nn.Module, kind: type[torch.optim.Optimizer], rank: int, num_experts: int, **options) -> None:
    optimizer = kind(model.parameters(), lr=0.01, weight_decay=0.1, **options)
    every = list(range(num_experts))
    # Unused from the start, and after all were used; used by one process, by both, by the first or the second only.
    for tasks, expected in ((TASKS[rank], {0, 2}), (every, set(every)), ([[0, 1], [1, 1]][rank], {0, 1})):
        before = snapshot(model, optimizer)
        step(model, optimizer, tasks)
        assert moved(before, snapshot(model, optimizer)) == expected, (tasks, expected)


def check_ddp(rank: int) -> None:
    for kind in (torch.optim.AdamW, torch.optim.SGD):
        model = DistributedDataParallel(make(4), find_unused_parameters=True)
        options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
        check_steps(model, kind, rank, 4, **options)
        for value in snapshot(model, kind(model.parameters())).values():
            other = value.clone()
            torch.distributed.broadcast(other, 0)
            assert torch.equal(value, other)  # the same model in both processes


def check_fsdp2(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for num_experts, place in (
        (3, None),  # two in one process, one in the other
        (4, lambda parameter: Shard(parameter.dim() - 1)),  # a part of each expert in each process
    ):
        model = make(num_experts)
        for layer in model.base_model.model.encoder.layer:
            fully_shard(layer, mesh=mesh, shard_placement_fn=_only_experts(place))
        fully_shard(model, mesh=mesh, shard_placement_fn=_only_experts(place))
        parameters = [parameter for name, parameter in model.named_parameters() if "mola_" in name]
        assert all(isinstance(parameter, DTensor) for parameter in parameters)
        check_steps(model, torch.optim.AdamW, rank, num_experts)


def _only_experts(place):
    # Dimension 1 of the base's biases does not exist.
    return None if place is None else lambda parameter: place(parameter) if parameter.dim() == 3 else None


def check_replicated_shards(rank: int) -> None:
    """Each process holds the whole of the model in its shard, or half of it, by dimension of the mesh."""
    for shape in ((2, 1), (1, 2)):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
        model = make(4)
        fully_shard(model, mesh=mesh)
        assert next(model.parameters()).placements == (Replicate(), Shard(0))
        check_steps(model, torch.optim.AdamW, rank, 4, foreach=False)


def check_all() -> None:
    rank = Accelerator(cpu=True).process_index
    check_ddp(rank)
    check_fsdp2(rank)
    check_replicated_shards(rank)
