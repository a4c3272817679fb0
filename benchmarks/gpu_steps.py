"""Parts of `benchmarks/gpu.py` that make steps in a loop of their own: selection, GradCache, adapters."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import datasets
import torch
from gpu_run import MadePictures, Run
from peer_steps import make_model
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader, RandomSampler

from hf_dissect import MolaConfig, OnlineSelector, forward_inputs
from hf_dissect.data import as_pairs
from hf_dissect.losses import ContrastiveLoss, grad_cached_backward
from hf_dissect.models.loading import logit_scale_and_bias
from hf_dissect.selection import LoopHooks
from hf_dissect.selection.planned_loading import BlockCollator, load_by_plan

RATIOS = (0.5, 0.2)
SCORED_EPOCHS = 2
BATCHES_AN_EPOCH = 3
TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


class Learner:
    """A model with its optimiser, which all kinds of steps share.

    Args:
        run: Run.
        model: Dual encoder.
        chunk: Pairs beyond which a batch trains by GradCache in chunks; None for never.
    """

    def __init__(self, run: Run, model: nn.Module, chunk: int | None) -> None:
        self.run, self.chunk, self.loss = run, chunk, ContrastiveLoss()
        self.model = model.to(run.device).train()
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=run.device == "cuda")

    def train(self, batch: dict[str, torch.Tensor], note: Callable[[Any], None] | None = None) -> None:
        """Make an update; `note` gets the outputs of the model."""
        inputs = forward_inputs(self.model, batch)
        weights = batch.get("reweigh", batch.get("pair_weight"))

        def loss_of(outputs: Any, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
            if note is not None:
                note(outputs)
            return self.loss(outputs, scale=scale, bias=bias, weights=weights)

        if self.chunk is not None and len(inputs["input_ids"]) > self.chunk:
            grad_cached_backward(self.model, inputs, loss_of, chunk_size=self.chunk, autocast=self.run.autocast)
        else:
            with self.run.autocast():
                outputs = self.model(**inputs)
                loss = loss_of(outputs, *logit_scale_and_bias(self.model))
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class Selection:
    """Steps with selection, whose batches come from a loader that follows the plan of the selector.

    Args:
        learner: Model to train.
        pictures: Collator of the pairs.
        candidates: Number of candidates of a step.
        ratio: Selection ratio.
        rescore_every: See `OnlineSelector`.
    """

    def __init__(
        self, learner: Learner, pictures: MadePictures, candidates: int, ratio: float, rescore_every: int
    ) -> None:
        count = BATCHES_AN_EPOCH * candidates
        names = [str(row) for row in range(count)]
        pairs = as_pairs(datasets.Dataset.from_dict({"image": names, "caption": names}))
        self.learner, self.rescore_every = learner, rescore_every
        self.selector = OnlineSelector(
            "noisy_channel",
            ratio,
            num_samples=count,
            rescore_every=rescore_every,
            scoring_batch_size=learner.run.chunk,
            hooks=replace(LoopHooks(), autocast=learner.run.autocast),
        )
        self._loader = DataLoader(
            load_by_plan(self.selector.plan, pairs, self.selector.ledger),
            batch_size=candidates,
            sampler=RandomSampler(pairs, generator=torch.Generator().manual_seed(1)),
            collate_fn=BlockCollator(pictures),
        )
        self._batches = self._read()
        self.kept: list[int] = []

    def _read(self) -> Iterator[dict[str, torch.Tensor]]:
        epoch = 0
        while True:
            self.selector.begin_epoch(epoch)
            yield from self._loader
            epoch += 1

    def step(self) -> None:
        """Select and train; the first call also makes those steps in which a ledger-first selection scores all."""
        first = not self.kept
        for _ in range(SCORED_EPOCHS * BATCHES_AN_EPOCH + 2 if first and self.rescore_every > 1 else 1):
            batch = self.selector.select(self.learner.model, next(self._batches))
            self.kept.append(len(batch["sample_id"]))
            ids = batch["sample_id"]
            self.learner.train(batch, lambda outputs, ids=ids: self.selector.record_training(ids, outputs))
            self.selector.finish_step(self.learner.model)


def measure_steps(run: Run, size: str) -> dict[str, Any]:
    """Measure plain and selected steps, with each number of candidates."""
    size = run.name_size(size)
    pictures = MadePictures(run, size)
    learner = Learner(run, make_model(size), run.chunk)
    results = run.found
    results |= {"size": size, "grad_cache_beyond": run.chunk, "strategy": "noisy_channel"}
    for candidates in run.candidates:
        steps: dict[str, Callable[[], Any]] = {}
        for name, count in {"plain": candidates, **{f"kept {r}": round(r * candidates) for r in RATIOS}}.items():
            steps[name] = lambda count=count: learner.train(pictures.take(list(range(count))))
        selections = {
            f"{kind} {ratio}": Selection(learner, pictures, candidates, ratio, every)
            for ratio in RATIOS
            for kind, every in (("selected", 1), ("rescore_every 8", 8))
        }
        steps |= {name: selection.step for name, selection in selections.items()}
        figures = run.take_turns(steps)
        for name, selection in selections.items():
            kept = figures[f"kept {name.split()[-1]}"]
            figures[name]["kept_pairs"] = selection.kept[-1] if selection.kept else 0
            if "ms_median" in kept and "ms_median" in figures[name]:
                figures[name]["efficiency"] = round(kept["ms_median"] / figures[name]["ms_median"], 3)
        results[str(candidates)] = figures
        run.free()
    return results


def measure_grad_cache(run: Run) -> dict[str, Any]:
    """Measure steps of the same batch at once and in chunks."""
    size, batch = run.name_size("ViT-B/32"), run.candidates[0]
    pictures, model = MadePictures(run, size), make_model(size)
    inputs, steps = pictures.take(list(range(batch))), {}
    for name, chunk in {"at once": None, "chunks of 1/4": batch // 4, "chunks of 1/16": batch // 16}.items():
        learner = Learner(run, model, chunk)
        steps[name] = lambda learner=learner: learner.train(inputs)
    return {"size": size, "batch": batch, **run.take_turns(steps)}


def measure_adapters(run: Run) -> dict[str, Any]:
    """Measure steps of adapters on a frozen base."""
    size, batch, experts = run.name_size("ViT-B/32"), run.candidates[0] // 4, 4
    pictures, steps = MadePictures(run, size), {}
    tasks = torch.arange(batch, device=run.device) % experts
    mola = {"num_experts": experts, "r": 8, "target_modules": TARGETS}
    configs = {
        "LoRA r": LoraConfig(r=8, target_modules=TARGETS),
        "LoRA E r": LoraConfig(r=8 * experts, target_modules=TARGETS),
        "MoLA, experts of the tasks": MolaConfig(variant="grad", **mola),
        "MoLA, router": MolaConfig(variant="router", **mola),
    }
    inputs = pictures.take(list(range(batch)))
    for name, config in configs.items():
        learner = Learner(run, get_peft_model(make_model(size), config), None)
        steps[name] = lambda learner=learner: learner.train({**inputs, "task_id": tasks})
    figures = run.take_turns(steps)
    for own in figures.values():
        if "ms_median" in own and "ms_median" in figures["LoRA r"]:
            own["over_lora_r"] = round(own["ms_median"] / figures["LoRA r"]["ms_median"], 3)
    return {"size": size, "batch": batch, "experts": experts, "r": 8, **figures}
