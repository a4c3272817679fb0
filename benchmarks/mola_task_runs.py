"""The tasks, networks and training loop of mola_tasks.py."""

import argparse
import functools
import math
import statistics
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from tqdm.auto import tqdm
from transformers import ResNetConfig, ResNetForImageClassification

from hf_dissect.mola import MolaConfig, mola_routing
from hf_dissect.mola.task_norms import TaskBatchNorm

TASKS = (
    "clothing",
    "digits",
    "emoji-group",
    "office-caltech",
    "pacs-photo-art-cartoon",
    "pacs-sketch",
    "utd-depth-motion",
    "utd-inertial",
    "utd-skeleton",
)
METHODS = (
    "single",
    "hard",
    "hard-norms",
    "mola-grad-norms",
    "lora-norms",
    "mola-grad",
    "mola-router",
    "lora",
    "mola-router-norms",
)
_RATES = {"lr": (2.5e-3, 5e-3, 1e-2)}
_SCALES = {"alpha": (0.25, 1.0, 4.0)}
GRID = {name: (_SCALES if name.startswith(("mola", "lora")) else {}) | _RATES for name in METHODS}
SPLITS = ("train", "validation", "test")
LAYERS = r".*convolution"


def list_tasks(folder: Path, names: list[str] | None) -> list[str]:
    """Names of the tasks to use, those of the table first; those that the folder lacks are printed."""
    present = set(find_arrays(folder))
    for name in names or TASKS:
        if name not in present:
            print(f"{name} is not in {folder}: left out")
    chosen = [name for name in names or (*TASKS, *sorted(present - set(TASKS))) if name in present]
    if not chosen:
        raise SystemExit(f"--data {folder}: no npz file with the arrays of a task, NAME/image, NAME/label, NAME/split")
    return chosen


@functools.cache
def find_arrays(folder: Path) -> dict[str, Path]:
    """The file of each task in a folder."""
    files = {}
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as arrays:
            files |= {name.removesuffix("/image"): path for name in arrays.files if name.endswith("/image")}
    return files


@functools.cache
def read_task(folder: Path, name: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Images, uint8 (n, 3, 32, 32), and labels of each split of a task."""
    with np.load(find_arrays(folder)[name]) as arrays:
        image, label, split = (arrays[f"{name}/{part}"] for part in ("image", "label", "split"))
    pixels, labels = torch.from_numpy(image).permute(0, 3, 1, 2), torch.from_numpy(label.astype(np.int64))
    return {part: (pixels[split == number], labels[split == number]) for number, part in enumerate(SPLITS)}


class Tasks:
    """The rows of some tasks in one table, with a range of classes for each task."""

    def __init__(self, names: list[str], split: str, options: argparse.Namespace):
        parts = [read_task(options.data, name) for name in names]
        self.names = names
        classes = [1 + max(int(labels.max()) for _, labels in part.values()) for part in parts]
        self.first_class = torch.tensor([0, *classes]).cumsum(0)
        self.task_of_class = torch.repeat_interleave(torch.arange(len(names)), torch.tensor(classes))
        self.sizes = [len(part[split][1]) for part in parts]
        self.first_row = torch.tensor([0, *self.sizes]).cumsum(0)
        self.task = torch.repeat_interleave(torch.arange(len(names)), torch.tensor(self.sizes))
        self.image = torch.cat([part[split][0] for part in parts])
        self.label = torch.cat([part[split][1] for part in parts]) + self.first_class[self.task]

    def draw(self, steps: int, batch: int, seed: int) -> torch.Tensor:
        """Rows of the batches, (steps, tasks * batch); those of a task depend on its name and the seed alone."""
        columns = []
        for name, size, first in zip(self.names, self.sizes, self.first_row, strict=False):
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
            epochs = math.ceil(steps * batch / size)
            rows = torch.cat([torch.randperm(size, generator=generator) for _ in range(epochs)])
            columns.append(rows[: steps * batch].view(steps, batch) + first)
        return torch.cat(columns, 1)


@functools.cache
def measure_pixels(options_data: Path, names: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of each channel, over the training images of all tasks."""
    images = torch.cat([read_task(options_data, name)["train"][0][::7] for name in names]).float()
    return images.mean((0, 2, 3))[:, None, None], images.std((0, 2, 3))[:, None, None]


def shift(images: torch.Tensor, pixels: int, generator: torch.Generator) -> torch.Tensor:
    """Move each image (n, 3, h, w) by up to some pixels, over a border that repeats its edge."""
    count, _, height, width = images.shape
    offsets = torch.randint(-pixels, pixels + 1, (2, count, 1), generator=generator)
    rows = (torch.arange(height) + offsets[0]).clamp(0, height - 1)
    columns = (torch.arange(width) + offsets[1]).clamp(0, width - 1)
    images = images.permute(0, 2, 3, 1)[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None]]
    return images.permute(0, 3, 1, 2)


class NormByTask(nn.Module):
    """The batch norm of each task, as MoLA's `task_norms` has it, in a network without MoLA."""

    def __init__(self, base: nn.Module, num_tasks: int, tasks: dict[str, torch.Tensor]):
        super().__init__()
        self.norm = TaskBatchNorm(base, num_tasks)
        self.__dict__.update(base=base, tasks=tasks)  # the settings of the base, none of its parameters

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.base, x, self.tasks["now"])


class Training:
    """One network, which learns some tasks."""

    def __init__(self, method: str, names: list[str], seed: int, settings: dict, options: argparse.Namespace):
        self.options = argparse.Namespace(**vars(options) | settings)
        self.method, self.names, self.seed = method, names, seed
        self.data = Tasks(names, "train", options)
        self.pixels = measure_pixels(options.data, tuple(options.tasks))
        torch.manual_seed(seed)
        model = ResNetForImageClassification(
            ResNetConfig(
                embedding_size=options.widths[0],
                hidden_sizes=options.widths,
                depths=[1] * len(options.widths),
                layer_type="basic",
                downsample_in_first_stage=False,
                num_labels=len(self.data.task_of_class),
            )
        )
        model.resnet.embedder.pooler = nn.Identity()  # 32 pixels are few already
        model = model.to(memory_format=torch.channels_last)
        self.tasks = {}
        self.model = self._adapt(model).train()
        self.routing = mola_routing(self.model)
        self.needs_tasks = self.routing is not None and self.routing.needs_task_ids
        self.optimizer = self._make_optimizer()
        warmup = max(1, options.steps * options.warmup)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / options.steps)),
        )
        self.generator = torch.Generator().manual_seed(seed)

    def _adapt(self, model: nn.Module) -> nn.Module:
        options, experts = self.options, len(self.names)
        kind, *parts = self.method.split("-")
        pattern = {rf".*encoder\.stages\.{stage}\..*": rank for stage, rank in enumerate(options.ranks)}
        # The same factor alpha / rank in all layers, and in LoRA.
        factor = options.alpha / options.ranks[0]
        if kind == "lora":
            ranks = {key: rank * experts for key, rank in pattern.items()}
            config = LoraConfig(
                target_modules=LAYERS,
                r=options.ranks[0] * experts,
                rank_pattern=ranks,
                lora_alpha=factor * options.ranks[0] * experts,
                alpha_pattern={key: factor * rank for key, rank in ranks.items()},
            )
            model = get_peft_model(model, config).requires_grad_(True)
        if kind == "mola":
            config = MolaConfig(
                variant=parts[0],
                num_experts=experts,
                target_modules=LAYERS,
                r=options.ranks[0],
                rank_pattern=pattern,
                alpha=options.alpha,
                alpha_pattern={key: factor * rank for key, rank in pattern.items()},
                train_base="all",
                router_image_size=options.router_side,
                decorrelation_weight=options.decorrelation,
                task_norms="norms" in parts,
            )
            return get_peft_model(model, config)
        if "norms" in parts:
            for parent in list(model.modules()):
                for name, child in parent.named_children():
                    if isinstance(child, nn.BatchNorm2d):
                        setattr(parent, name, NormByTask(child, experts, self.tasks))
        return model

    def _make_optimizer(self) -> torch.optim.Optimizer:
        """AdamW, with a rate of their own for the adapters, and no decay of biases and normalisations."""
        options, groups = self.options, {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                adapter = any(part in name for part in ("lora_", "mola_A", "mola_B"))
                decays = parameter.ndim > 1 and "norm" not in name
                rate = options.lr * (options.adapter_lr if adapter else 1)
                groups.setdefault((rate, options.weight_decay if decays else 0), []).append(parameter)
        return torch.optim.AdamW([{"params": group, "lr": lr, "weight_decay": d} for (lr, d), group in groups.items()])

    def logits(self, images: torch.Tensor, tasks: torch.Tensor) -> torch.Tensor:
        """Scores of the classes of each image's own task; minus infinity for the others."""
        mean, deviation = self.pixels
        pixels = ((images - mean) / deviation).contiguous(memory_format=torch.channels_last)
        self.tasks["now"] = tasks
        scores = self.model(pixels, **{"task_ids": tasks} if self.needs_tasks else {}).logits
        return scores.masked_fill(self.data.task_of_class != tasks[:, None], -torch.inf)

    def step(self, rows: torch.Tensor) -> float:
        tasks, labels = self.data.task[rows], self.data.label[rows]
        images = shift(self.data.image[rows], self.options.shift, self.generator)
        scores = self.logits(images, tasks).log_softmax(-1)
        own = self.data.task_of_class == tasks[:, None]
        even = scores.masked_fill(~own, 0).sum(-1) / own.sum(-1)
        smoothing = self.options.label_smoothing
        loss = (1 - smoothing) * F.nll_loss(scores, labels) - smoothing * even.mean()
        if self.routing is not None and self.routing.decorrelates:
            loss = loss + self.routing.decorrelation_loss(tasks)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.item()

    @torch.no_grad()
    def evaluate(self, split: str) -> dict:
        """Accuracy by task, and, for a router, the mean weight of each expert by task."""
        self.model.eval()
        data = Tasks(self.names, split, self.options)
        correct, weights = [], []
        for rows in torch.arange(len(data.label)).split(256):
            scores = self.logits(data.image[rows], data.task[rows])
            correct.append(scores.argmax(-1) == data.label[rows])
            if self.routing is not None and not self.needs_tasks:
                weights.append(self.routing.last_weights()["model"])
        self.model.train()
        members = {name: data.task == place for place, name in enumerate(self.names)}
        correct = torch.cat(correct).float()
        result = {"accuracy": {name: correct[member].mean().item() for name, member in members.items()}}
        if weights:
            weights = torch.cat(weights)
            result["expert_weights"] = {name: weights[member].mean(0).tolist() for name, member in members.items()}
        return result


def run(method: str, seed: int, settings: dict, options: argparse.Namespace) -> dict:
    """Train with a method and evaluate it."""
    torch.set_num_threads(1)
    groups = [[name] for name in options.tasks] if method == "single" else [options.tasks]
    result, losses, parameters, start = {"accuracy": {}}, [], 0, time.process_time()
    with tqdm(total=options.steps * len(groups), desc=f"{method}, seed {seed}", leave=False, disable=None) as bar:
        for names in groups:
            training = Training(method, names, seed, settings, options)
            own = []
            for rows in training.data.draw(options.steps, options.batch, seed):
                own.append(training.step(rows))
                bar.update()
            losses.append(statistics.mean(own[-50:]))
            parameters += sum(weights.numel() for weights in training.model.parameters() if weights.requires_grad)
            seconds = time.process_time() - start
            made = training.evaluate(options.split)
            result |= made | {"accuracy": result["accuracy"] | made["accuracy"]}
    return {
        "method": method,
        "seed": seed,
        "steps": options.steps,
        "split": options.split,
        "settings": settings,
        "seconds": seconds,
        "parameters": parameters,
        "last_loss": statistics.mean(losses),
        "mean": statistics.mean(result["accuracy"].values()),
        **result,
    }
