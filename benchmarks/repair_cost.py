"""What repair adds to a step with the weights of the noisy channel, in one run.

    python benchmarks/repair_cost.py [--batch 512] [--rounds 20] [--output benchmarks/results/repair_cost.json]

Timed is a whole training step of two models: that of recipes/flickr8k-features.yaml (stored image features, one small
text layer: as little beside the loss as can be) and that of recipes/quickstart.yaml (a small CLIP with two towers that
train). A larger model makes the ratio smaller. The memory is full, and repair has its whole strength. "encoder" is a
frozen image encoder that costs as much as the model's own image tower. The kinds take turns, and the order changes
each round; the processor time is what a machine that others use as well leaves comparable.
"""

import argparse
import copy
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from gsc_cost import make_model_and_batch, measure
from results_file import show_and_write

from hf_dissect.models.loading import logit_scale_and_bias
from hf_dissect.models.vision_towers import Tower
from hf_dissect.objective import Objective
from hf_dissect.objectives.image_space import AverageSpace, EncoderSpace, ImageSpace, StoredSpace
from hf_dissect.objectives.noisy_channel import NoisyChannelObjective
from hf_dissect.objectives.repair import Repair
from hf_dissect.selection import SampleLedger

PLAIN = "noisy_channel"
MODELS = {"features": "flickr8k-features", "small_clip": "quickstart"}
KINDS = {
    "features": ("stored", "learnt", "both sides"),
    "small_clip": ("learnt", "both sides", "average", "encoder"),
}


def make_repair(kind: str, model: torch.nn.Module) -> Repair | None:
    """The repair of a kind."""
    if kind == PLAIN:
        return None
    space = {"stored": StoredSpace, "average": AverageSpace}.get(kind, ImageSpace)()
    if kind == "encoder":
        space = EncoderSpace(Tower(copy.deepcopy(model.vision_model).eval(), "pooler", 0))
    return Repair(side="both" if kind == "both sides" else "caption", space=space)


def whole_step(kind: str, recipe: str, options: argparse.Namespace) -> Callable[[], None]:
    """A training step of a recipe's model, on a random batch."""
    model, inputs = make_model_and_batch(recipe, options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    number = torch.arange(options.batch)
    batch = {**inputs, "sample_id": number, "image_key": number}
    repair = make_repair(kind, model)
    objective = Objective("softmax", robust=NoisyChannelObjective(0.1), repair=repair)
    ledger = SampleLedger(options.batch, columns=objective.columns)
    if repair is not None:
        outputs = model(**inputs)
        width = repair.space.embed(model, batch, outputs, True).shape[1]
        keys = torch.arange(repair.memory).repeat(2, 1) + options.batch
        captions = F.normalize(torch.randn(repair.memory, options.dim), dim=-1)
        repair.pairs.add(captions, torch.randn(repair.memory, width), torch.ones(repair.memory), keys, keys[0] > 0)

    def step() -> None:
        objective.begin_step(1.0)
        outputs = model(**inputs)
        objective.compute_loss(model, batch, outputs, *logit_scale_and_bias(model), ledger).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # as the Trainer does
        optimizer.step()
        optimizer.zero_grad()
        if repair is not None and not repair.pop_logs():
            raise RuntimeError(f"{kind}: nothing was repaired")

    return step


def summarise(seconds: dict[str, list[dict[str, float]]]) -> dict[str, dict]:
    """Milliseconds of a step, and its ratio to that of the noisy channel alone, by kind."""
    results = {}
    for kind, own in seconds.items():
        ratios = [mine["processor"] / plain["processor"] for mine, plain in zip(own, seconds[PLAIN], strict=True)]
        results[kind] = {
            "ms_per_step_median": statistics.median(value["processor"] for value in own) * 1000,
            "ratio_median": statistics.median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
        }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results: dict = {name: getattr(options, name) for name in ("batch", "dim", "rounds", "threads")}
    results["torch"] = torch.__version__
    for name, recipe in MODELS.items():
        steps = {kind: whole_step(kind, recipe, options) for kind in (PLAIN, *KINDS[name])}
        results[name] = summarise(measure(steps, options.rounds))
    show_and_write(results, options.output)


if __name__ == "__main__":
    main()
