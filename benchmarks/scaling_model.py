"""What online selection costs on up to a thousand GPUs, on paper: bytes, and their time at given bandwidths."""

import math
import time
from dataclasses import dataclass

import numpy as np
import torch

from hf_dissect.selection.scope import plan_moves
from hf_dissect.selection.shard_group import Route, as_bytes, plan_stages

# What the ranks tell each other of a candidate whose id is a row number: id and correlation.
ROW_BYTES = 8 + 4
# With a record of every choice: id, correlation, kept.
RECORD_BYTES = 8 + 4 + 1
# Before a global choice (`GatheredScores`, `share_fetched`): id and correlation, id and two columns of the ledger.
CHOICE_BYTES = 8 + 4 + 8 + 2 * 4
# A place of a packet of a `ShardedLedger` of two columns: the id asked for, the values in return, id and correlation.
PACKET_BYTES = (8, 2 * 4, 8 + 4)
EXCHANGES = len(PACKET_BYTES)


@dataclass(frozen=True)
class Assumptions:
    """The training and the machines; all of it can be set on the command line.

    Attributes:
        candidates: B, of a GPU and step.
        ratio: share of the candidates that train.
        dim: D, of the embeddings, exchanged as float32.
        parameters: of the model, whose float32 gradients are averaged by DDP (ViT-B/16 CLIP).
        image_size, pixel_bytes, tokens: of a pair: 3 * size ** 2 pixels; token ids and mask as int64.
        nic_gbps: gigabits a second and GPU between machines, in each direction.
        nvlink_gb: gigabytes a second and GPU within a machine, in each direction.
        gpus_per_node: GPUs of a machine, each with a network card of its own.
        net_hop_us, nvlink_hop_us: latency of one hop of a ring.
        peak_tflops: of bfloat16 without sparsity (H100, H200).
        utilisation: share of the peak that the model reaches.
        ledger_ns: of the processor for one id of a step: one look-up and two writes, measured (`ledger.py`).
        row_ns: the same for row numbers, measured (`ledger.py`).
        message_us: of the processor to send to another process and to receive from it, measured (`scaling_ledger.py`).
        stage_us: of the processor for a stage of an exchange, measured there, too.
    """

    candidates: int = 1280
    ratio: float = 0.5
    dim: int = 512
    parameters: float = 150e6
    image_size: int = 224
    pixel_bytes: int = 4
    tokens: int = 77
    nic_gbps: float = 400.0
    nvlink_gb: float = 450.0
    gpus_per_node: int = 8
    net_hop_us: float = 5.0
    nvlink_hop_us: float = 1.0
    peak_tflops: float = 989.0
    utilisation: float = 0.4
    ledger_ns: float = 660.0
    row_ns: float = 129.0
    message_us: float = 164.0
    stage_us: float = 559.0

    @property
    def kept(self) -> int:
        return round(self.candidates * self.ratio)

    @property
    def nic(self) -> float:
        """Bytes a second."""
        return self.nic_gbps * 1e9 / 8

    @property
    def pair_bytes(self) -> int:
        return 3 * self.image_size**2 * self.pixel_bytes + 2 * 8 * self.tokens

    @property
    def step_seconds(self) -> float:
        """Score B candidates (one forward pass), train k of them (three times a forward pass)."""
        forward = transformer_flops(197, 768, 12) + 2 * 196 * 768 * 768 + transformer_flops(77, 512, 12)
        return forward * (self.candidates + 3 * self.kept) / (self.peak_tflops * 1e12 * self.utilisation)


def transformer_flops(tokens: int, width: int, layers: int) -> float:
    """Of a forward pass: 24 width ** 2 for the matrices of a token, 4 tokens * width for its attention."""
    return layers * tokens * (24 * width**2 + 4 * tokens * width)


def latency(a: Assumptions, gpus: int) -> float:
    """Seconds in which the first byte goes once round a ring of all GPUs."""
    nodes = math.ceil(gpus / a.gpus_per_node)
    crossings = nodes if nodes > 1 else 0
    return (crossings * a.net_hop_us + (gpus - crossings) * a.nvlink_hop_us) * 1e-6


def gather_seconds(a: Assumptions, gpus: int, own_bytes: float) -> float:
    """All-gather, or reduce-scatter, of `own_bytes` from each GPU.

    NCCL lets each network card of a machine carry its share of what comes from other machines, and passes it on by
    NVLink meanwhile: the slower of the two counts.
    """
    local = min(gpus, a.gpus_per_node)
    between = (gpus - local) * own_bytes / (local * a.nic)
    within = (gpus - 1) * own_bytes / (a.nvlink_gb * 1e9)
    return max(between, within) + latency(a, gpus)


def ring_seconds(a: Assumptions, gpus: int, hop_bytes: float) -> float:
    """Once round, one GPU after the other: between two machines there is a single network card."""
    bandwidth, hop = (a.nic, a.net_hop_us) if gpus > a.gpus_per_node else (a.nvlink_gb * 1e9, a.nvlink_hop_us)
    return gpus * (hop_bytes / bandwidth + hop * 1e-6)


def moved_pairs(a: Assumptions, gpus: int) -> float:
    """Pairs that a rank gives away on average when the k best of all are shared out equally.

    Where scores do not depend on the rank, the kept pairs of a rank are hypergeometric: B draws out of G * B, of which
    G * k are kept, so with p = k / B the variance is `B p (1 - p) (G - 1) B / (G B - 1)`. Of a normal variable with
    standard deviation s the mean of the part above its mean is `s / sqrt(2 pi)`.
    """
    p = a.kept / a.candidates
    variance = a.candidates * p * (1 - p) * (gpus - 1) * a.candidates / (gpus * a.candidates - 1)
    return math.sqrt(variance / (2 * math.pi))


def simulate_moves(a: Assumptions, gpus: int, repeats: int = 200) -> dict[str, float]:
    """The same by drawing, and what only drawing tells: the rank with the most to send, and the time of planning."""
    generator = np.random.default_rng(0)
    counts = generator.multivariate_hypergeometric(
        [a.candidates] * gpus, gpus * a.kept, size=repeats, method="marginals"
    )
    surplus = (counts - a.kept).clip(0)
    start = time.perf_counter()
    sent, received = plan_moves(counts[0].tolist(), rank=0)
    seconds = time.perf_counter() - start
    assert sum(sent) - sum(received) == counts[0, 0] - a.kept
    return {"mean": surplus.mean(), "largest": surplus.max(1).mean(), "planning_ms": seconds * 1000}


def packet_costs(a: Assumptions, gpus: int, repeats: int = 20) -> dict[str, float]:
    """Bytes and processor time of the packets of a step; their size is that of the fullest of all ranks, drawn."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(2**62, (a.candidates,), generator=generator) for _ in range(repeats)]
    routes = [Route(part, gpus) for part in ids]
    # The fullest packet of all ranks is fuller than that of a few: the largest of gpus ** 2 binomial numbers.
    drawn = np.random.default_rng(0).binomial(a.candidates, 1 / gpus, size=(5, gpus**2)).max(1)
    split = max(int(np.median(drawn)), *(route.fullest for route in routes))
    values = torch.rand(a.candidates)
    start = time.process_time()
    for part in ids:
        route = Route(part, gpus)
        asked = route.pack(as_bytes([part]), split, gpus).view(torch.int64).flatten()
        places = (asked >= 0).nonzero().flatten()
        replies = torch.zeros(gpus, split, 2)
        replies.view(-1, 2)[places] = 1.0
        route.unpack(replies, split)
        Route(part, gpus).pack(as_bytes([part, values]), split, gpus)
    seconds = (time.process_time() - start) / repeats
    return {"split": split, "packing_seconds": seconds, "bytes": gpus * split * sum(PACKET_BYTES)}


def ledger_costs(a: Assumptions, gpus: int) -> dict[str, dict[str, float]]:
    """Costs of a `ShardedLedger`: of the exchanges, in a thread next to the training, and of the own pairs."""
    packets, stages = packet_costs(a, gpus), plan_stages(gpus)
    peers = sum(size - 1 for size in stages)
    on_the_wire = len(stages) * packets["bytes"]
    spent_us = EXCHANGES * (peers * a.message_us + len(stages) * (a.stage_us + a.net_hop_us))
    own = a.candidates * a.ledger_ns * 1e-9 + packets["packing_seconds"]
    exchange = {"bytes": on_the_wire, "seconds": on_the_wire / a.nic + spent_us * 1e-6}
    return {
        "ledger: packets": {**exchange, "places": packets["split"], "peers": peers},
        "ledger: own pairs (processor)": {"bytes": 0, "seconds": own},
    }


def add_up(parts: list[dict[str, float]]) -> dict[str, float]:
    return {key: sum(part[key] for part in parts) for key in ("bytes", "seconds")}


def costs(a: Assumptions, gpus: int) -> dict[str, dict[str, float]]:
    """Bytes that a GPU receives, and seconds, of each part of a step."""
    others, features = gpus - 1, a.kept * a.dim * 4
    moved, drawn = moved_pairs(a, gpus), simulate_moves(a, gpus)

    def gathered(own_bytes: float, times: int = 1) -> dict[str, float]:
        return {"bytes": times * others * own_bytes, "seconds": times * gather_seconds(a, gpus, own_bytes)}

    gradient_bytes = a.parameters * 4 / gpus
    sizes = gathered(3 * 8)
    ledger = ledger_costs(a, gpus)
    scores = gathered(CHOICE_BYTES * a.candidates)
    rebalancing = {
        "bytes": moved * a.pair_bytes,
        "seconds": drawn["largest"] * a.pair_bytes / a.nic + latency(a, gpus) + drawn["planning_ms"] / 1000,
        "pairs_mean": moved,
        "pairs_mean_simulated": drawn["mean"],
        "pairs_of_the_fullest_rank": drawn["largest"],
        "planning_ms": drawn["planning_ms"],
    }
    embeddings = gathered(2 * a.candidates * a.dim * 4)
    local, everywhere = [sizes, *ledger.values()], [scores, rebalancing]
    rows = [gathered(ROW_BYTES * a.candidates), {"bytes": 0, "seconds": gpus * a.candidates * a.row_ns * 1e-9}]
    return {
        "features, softmax loss": gathered(2 * features, times=2),
        "features, sigmoid ring": {
            "bytes": (2 * others + 1) * features,
            "seconds": ring_seconds(a, gpus, 2 * features),
        },
        "gradients (DDP)": gathered(gradient_bytes, times=2),
        "numbers of candidates": sizes,
        **ledger,
        "**local choice, if nothing overlaps**": add_up(local),
        "**local choice, what the training waits for**": add_up([sizes, ledger["ledger: own pairs (processor)"]]),
        "global: scores": scores,
        "global: rebalancing": rebalancing,
        "**global choice, if nothing overlaps**": add_up(local + everywhere),
        "global: embeddings, for rules by the loss": embeddings,
        "with a record of every choice": gathered(RECORD_BYTES * a.candidates),
        "ids are row numbers: instead of the packets": add_up(rows),
    }
