"""What a step with the GSC loss costs, against the contrastive one, in one run.

    python benchmarks/gsc_cost.py [--batch 1024] [--dim 512] [--rounds 10] [--output benchmarks/results/gsc_cost.json]

Timed are the loss and its backward pass alone, on embeddings, and a whole training step of two models: that of
recipes/flickr8k-features.yaml (stored image features, one small text layer: as little beside the loss as can be) and
that of recipes/quickstart.yaml (a small CLIP with both towers). A larger model makes the ratio smaller. "gsc" has all
a training step needs, that is, the evidence for the next soft labels as well; "gsc without evidence" is the loss only.
They take turns, and the order changes each round; the processor time is what a machine that others use as well leaves
comparable.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from results_file import show_and_write
from transformers import AutoConfig, AutoModel

from hf_dissect import Recipe
from hf_dissect.losses import ContrastiveLoss, GscLoss
from hf_dissect.models.loading import logit_scale_and_bias

OBJECTIVES = ("contrastive", "gsc without evidence", "gsc")
TOKENS, VOCABULARY = 20, 4096  # of the recipe


def objective_of(name: str, labels: torch.Tensor) -> Callable[[dict, torch.Tensor], torch.Tensor]:
    """The loss of a model's outputs, and of its scale."""
    contrastive, gsc = ContrastiveLoss(), GscLoss()

    def loss_of(outputs: dict, scale: torch.Tensor) -> torch.Tensor:
        if name == "contrastive":
            return contrastive(outputs, scale=scale)
        embeds = outputs["image_embeds"], outputs["text_embeds"]
        return gsc.with_evidence(*embeds, labels)[0] if name == "gsc" else gsc(*embeds, labels)

    return loss_of


def loss_alone(name: str, options: argparse.Namespace) -> Callable[[], None]:
    """Forward and backward on random embeddings."""
    generator = torch.Generator().manual_seed(0)
    embeds = F.normalize(torch.randn(2, options.batch, options.dim, generator=generator), dim=-1)
    leaves = {"image_embeds": embeds[0].clone(), "text_embeds": embeds[1].clone()}
    scale = torch.tensor(1 / 0.07, requires_grad=True)
    for leaf in leaves.values():
        leaf.requires_grad_()
    loss_of = objective_of(name, torch.rand(options.batch, generator=generator))

    def step() -> None:
        loss_of(leaves, scale).backward()

    return step


def make_model_and_batch(recipe: str, options: argparse.Namespace) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A recipe's model, fresh, and a batch of random images (or features) and captions."""
    torch.manual_seed(0)
    config = Recipe.load(recipe).model.config | {"projection_dim": options.dim}
    config["text_config"] = config["text_config"] | {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 2}
    model = AutoModel.from_config(AutoConfig.for_model(**config))
    vision = model.config.vision_config
    sides = (3, vision.image_size, vision.image_size) if hasattr(vision, "image_size") else (vision.hidden_size,)
    batch = {
        "input_ids": torch.randint(3, VOCABULARY, (options.batch, TOKENS)),
        "attention_mask": torch.ones(options.batch, TOKENS, dtype=torch.int64),
        "pixel_values": torch.randn(options.batch, *sides),
    }
    return model.train(), batch


def whole_step(name: str, options: argparse.Namespace, recipe: str) -> Callable[[], None]:
    """A training step of a recipe's model, fresh, on a random batch."""
    model, batch = make_model_and_batch(recipe, options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    loss_of = objective_of(name, torch.rand(options.batch))

    def step() -> None:
        loss_of(model(**batch), logit_scale_and_bias(model)[0]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # as the Trainer does
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[dict[str, float]]]:
    """Seconds a step, round by round."""
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
    names = list(steps)
    for round_number in range(rounds + 1):
        turn = round_number % len(names)
        for name in names[turn:] + names[:turn]:
            start = time.perf_counter(), time.process_time()
            steps[name]()
            elapsed = {"wall": time.perf_counter() - start[0], "processor": time.process_time() - start[1]}
            if round_number:  # the first round warms caches up
                seconds[name].append(elapsed)
    return seconds


def summary(seconds: dict[str, list[dict[str, float]]]) -> dict[str, dict]:
    results: dict[str, dict] = {}
    for name, own in seconds.items():
        results[name] = {}
        for clock in ("wall", "processor"):
            ratios = [mine[clock] / plain[clock] for mine, plain in zip(own, seconds["contrastive"], strict=True)]
            results[name][clock] = {
                "ms_per_step_median": statistics.median(value[clock] for value in own) * 1000,
                "ratio_to_contrastive_median": statistics.median(ratios),
                "ratio_to_contrastive_min": min(ratios),
                "ratio_to_contrastive_max": max(ratios),
            }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = {name: getattr(options, name) for name in ("batch", "dim", "rounds", "threads")}
    results["torch"] = torch.__version__
    for kind, build in {
        "loss_alone": loss_alone,
        "step_on_features": partial(whole_step, recipe="flickr8k-features"),
        "step_of_small_clip": partial(whole_step, recipe="quickstart"),
    }.items():
        results[kind] = summary(measure({name: build(name, options) for name in OBJECTIVES}, options.rounds))
    show_and_write(results, options.output)


if __name__ == "__main__":
    main()
