"""Does a mixture of low-rank adapters help a small network on four domains? PACS, from scratch, all trained jointly.

    python benchmarks/mola_pacs.py --data PACS [--seeds 0,1,2] [--split validation] [--workers 2] [--output F.json]
    python benchmarks/mola_pacs.py --data PACS --methods hard-sharing,mola-grad --seeds 0 --epochs 5

PACS is a folder with train.parquet, validation.parquet and test.parquet (columns `image`, `label`, `domain`). For one
seed, the methods share the initial weights of the base, the batches, the augmentation and the schedule; `lora` has as
many adapter parameters as the mixtures. Only `mola-grad` is told the domain of a test image. The time of a step is the
processor time of one thread, with the methods taking turns.
"""

import argparse
import functools
import io
import json
import math
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import datasets
import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from tqdm.auto import tqdm
from transformers import ResNetConfig, ResNetForImageClassification

from hf_dissect.mola import MolaConfig, mola_routing

METHODS = ("hard-sharing", "lora", "mola-grad", "mola-router", "mola-router+twd")
CLASSES = 7
Split = dict[str, torch.Tensor]


@functools.cache
def read_split(folder: Path, split: str, side: int) -> tuple[Split, list[str]]:
    """Images as uint8 (N, 3, side, side), labels and domains of a split, and the names of the domains."""
    rows = datasets.Dataset.from_parquet(str(folder / f"{split}.parquet"))
    images = np.empty((len(rows), side, side, 3), np.uint8)
    for place, image in enumerate(rows.cast_column("image", datasets.Image(decode=False))["image"]):
        with Image.open(io.BytesIO(image["bytes"])) as opened:
            images[place] = opened.convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
    columns = {name: torch.tensor(rows[name]) for name in ("label", "domain")}
    return {"image": torch.from_numpy(images).permute(0, 3, 1, 2), **columns}, rows.features["domain"].names


def pixel_values(images: torch.Tensor, statistics_of: torch.Tensor) -> torch.Tensor:
    """Standardise uint8 images by the channel means and deviations `statistics_of` (2, 3)."""
    mean, deviation = statistics_of[..., None, None]
    return ((images - mean) / deviation).contiguous(memory_format=torch.channels_last)


def augment(images: torch.Tensor, shift: int, generator: torch.Generator) -> torch.Tensor:
    """Mirror half of the images, and move each by up to `shift` pixels over a border that repeats its edge."""
    count, side = len(images), images.shape[-1]
    mirrored = torch.rand(count, generator=generator) < 0.5
    images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
    offsets = torch.randint(-shift, shift + 1, (2, count, 1), generator=generator)
    rows, columns = (torch.arange(side) + offsets).clamp(0, side - 1)
    return images.permute(0, 2, 3, 1)[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None]].permute(
        0, 3, 1, 2
    )


def build(method: str, seed: int, options: argparse.Namespace) -> torch.nn.Module:
    """The network of a method; its base starts from the same weights whatever the method."""
    torch.manual_seed(seed)
    model = ResNetForImageClassification(
        ResNetConfig(
            embedding_size=options.widths[0],
            hidden_sizes=options.widths[1:],
            depths=options.depths,
            layer_type="basic",
            downsample_in_first_stage=True,
            num_labels=CLASSES,
        )
    ).to(memory_format=torch.channels_last)
    pattern = {rf"encoder\.stages\.{stage}\..*": rank for stage, rank in enumerate(options.ranks)}
    if method == "lora":  # of rank E * r, and of the same scale alpha / r
        config = LoraConfig(
            target_modules=options.layers,
            r=options.ranks[-1] * options.experts,
            rank_pattern={key: rank * options.experts for key, rank in pattern.items()},
            lora_alpha=options.alpha * options.experts,
        )
        model = get_peft_model(model, config).requires_grad_(True)
    elif method != "hard-sharing":
        settings = {"variant": "grad"}
        if method != "mola-grad":
            weight = options.decorrelation if method.endswith("twd") else 0
            settings = {"variant": "router", "router_input": "pixels", "decorrelation_weight": weight}
            settings |= {"router_image_size": options.router_side, "router_architecture": "resnet20"}
        config = MolaConfig(
            num_experts=options.experts,
            target_modules=options.layers,
            r=options.ranks[-1],
            rank_pattern=pattern,
            alpha=options.alpha,
            train_base="all",
            **settings,
        )
        model = get_peft_model(model, config)
    return model


def parameters_by_kind(model: torch.nn.Module) -> dict[str, int]:
    """Trainable parameters of the base, the adapters and the router."""
    counts = {"base": 0, "adapters": 0, "router": 0}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = "router" if "router" in name else "adapters" if "lora_" in name or "mola_" in name else "base"
            counts[kind] += parameter.numel()
    return counts


def make_optimizer(model: torch.nn.Module, options: argparse.Namespace) -> torch.optim.Optimizer:
    """AdamW, with a rate and a decay of their own for the adapters, and no decay of biases and normalisations."""
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            adapter = ("lora_" in name or "mola_" in name) and "router" not in name
            decay = 0 if parameter.ndim < 2 else options.adapter_weight_decay if adapter else options.weight_decay
            groups.setdefault((options.lr * (options.adapter_lr if adapter else 1), decay), []).append(parameter)
    return torch.optim.AdamW([{"params": group, "lr": lr, "weight_decay": d} for (lr, d), group in groups.items()])


class Training:
    """One method with one seed: the model, its optimiser and its batches."""

    def __init__(self, method: str, seed: int, options: argparse.Namespace):
        self.options = options
        self.train, self.domains = read_split(options.data, "train", options.side)
        sample = self.train["image"][::7].float()
        self.channels = torch.stack([sample.mean((0, 2, 3)), sample.std((0, 2, 3))])
        self.model = build(method, seed, options)
        self.routing = mola_routing(self.model) if method.startswith("mola") else None
        self.needs_domains = self.routing is not None and self.routing.needs_task_ids
        self.optimizer = make_optimizer(self.model, options)
        self.steps = options.epochs * (len(self.train["label"]) // options.batch)
        warmup = self.steps * options.warmup
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / self.steps)),
        )
        self.generator = torch.Generator().manual_seed(seed)

    def batches(self, epochs: int):
        """Indices of the batches of some epochs; the rows left over in an epoch are dropped."""
        for _ in range(epochs):
            order = torch.randperm(len(self.train["label"]), generator=self.generator)
            yield from order[: len(order) // self.options.batch * self.options.batch].split(self.options.batch)

    def logits(self, images: torch.Tensor, domains: torch.Tensor) -> torch.Tensor:
        known = {"task_ids": domains} if self.needs_domains else {}
        return self.model(pixel_values=pixel_values(images, self.channels), **known).logits

    def step(self, rows: torch.Tensor) -> float:
        images = augment(self.train["image"][rows], self.options.shift, self.generator)
        domains = self.train["domain"][rows]
        scores = self.logits(images, domains)
        loss = torch.nn.functional.cross_entropy(
            scores, self.train["label"][rows], label_smoothing=self.options.label_smoothing
        )
        if self.routing is not None and self.routing.decorrelates:
            loss = loss + self.routing.decorrelation_loss(domains)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.item()

    @torch.no_grad()
    def evaluate(self, split: str) -> dict:
        """Accuracy per domain, their mean, and, for a router, the mean weight of each expert per domain."""
        self.model.eval()
        data, _ = read_split(self.options.data, split, self.options.side)
        correct, weights = [], []
        for rows in torch.arange(len(data["label"])).split(256):
            scores = self.logits(data["image"][rows], data["domain"][rows])
            correct.append(scores.argmax(-1) == data["label"][rows])
            if self.routing is not None and not self.needs_domains:
                weights.append(self.routing.last_weights()["model"])
        self.model.train()
        members = {name: data["domain"] == place for place, name in enumerate(self.domains)}
        correct = torch.cat(correct).float()
        result = {"accuracy": {name: correct[member].mean().item() for name, member in members.items()}}
        result["accuracy"]["mean"] = statistics.mean(result["accuracy"].values())
        if weights:
            weights = torch.cat(weights)
            result["expert_weights"] = {name: weights[member].mean(0).tolist() for name, member in members.items()}
        return result


def train_and_evaluate(method: str, seed: int, options: argparse.Namespace) -> dict:
    torch.set_num_threads(1)
    training = Training(method, seed, options)
    training.model.train()
    losses, start = [], time.process_time()
    progress = tqdm(
        training.batches(options.epochs), f"{method}, seed {seed}", training.steps, leave=False, disable=None
    )
    for rows in progress:
        losses.append(training.step(rows))
        progress.set_postfix(loss=f"{losses[-1]:.2f}", refresh=False)
    return {
        "method": method,
        "seed": seed,
        "training_s": time.process_time() - start,
        "last_loss": statistics.mean(losses[-50:]),
        **training.evaluate(options.split),
    }


def seconds_per_step(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Median processor time of a training step by method, and its ratio to the first method, in turns."""
    torch.set_num_threads(1)
    trainings = {method: Training(method, 0, options) for method in options.methods}
    seconds = {method: [] for method in options.methods}
    for turn in range(options.timing_rounds + 1):
        for method, training in trainings.items():
            batches = training.batches(10)
            start = time.process_time()
            for _ in range(10):
                training.step(next(batches))
            if turn:  # the first turn warms caches up
                seconds[method].append((time.process_time() - start) / 10)
    first = seconds[options.methods[0]]
    return {
        method: {
            "s_per_step": statistics.median(values),
            "ratio": statistics.median(own / other for own, other in zip(values, first, strict=True)),
            "trainable_parameters": parameters_by_kind(trainings[method].model),
        }
        for method, values in seconds.items()
    }


def summarise(runs: list[dict], costs: dict[str, dict], options: argparse.Namespace) -> dict[str, dict]:
    """Mean and sample standard deviation over the seeds, by method and domain."""
    table = {}
    for method in options.methods:
        own = [run["accuracy"] for run in runs if run["method"] == method]
        table[method] = {"accuracy": {}, **costs.get(method, {})}
        for domain in own[0]:
            values = [accuracy[domain] for accuracy in own]
            deviation = statistics.stdev(values) if len(values) > 1 else None
            table[method]["accuracy"][domain] = {"mean": statistics.mean(values), "deviation": deviation}
    return table


def markdown(table: dict[str, dict]) -> str:
    first = next(iter(table.values()))
    lines = [["method", *first["accuracy"], "parameters", "ms per step", "ratio"]]
    lines.append(["---"] * len(lines[0]))
    for method, row in table.items():
        cells = [
            f"{value['mean'] * 100:.1f}" + ("" if value["deviation"] is None else f" ± {value['deviation'] * 100:.1f}")
            for value in row["accuracy"].values()
        ]
        if "ratio" in row:
            count = sum(row["trainable_parameters"].values())
            cells += [f"{count:,}", f"{row['s_per_step'] * 1000:.1f}", f"{row['ratio']:.2f}"]
        lines.append([method, *cells, *[""] * (len(lines[0]) - 1 - len(cells))])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def parse() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split", default="validation", choices=("validation", "test"))
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2])
    parser.add_argument("--methods", type=lambda text: text.split(","), default=list(METHODS))
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--timing-rounds", type=int, default=5, help="0: do not time the steps")
    parser.add_argument("--output", type=Path)
    network = parser.add_argument_group("network")
    network.add_argument("--side", type=int, default=48, help="pixels of an image")
    network.add_argument("--widths", type=numbers, default=[16, 32, 64, 128], help="of the stem and of the stages")
    network.add_argument("--depths", type=numbers, default=[1, 1, 1])
    schedule = parser.add_argument_group("schedule")
    schedule.add_argument("--epochs", type=int, default=25)
    schedule.add_argument("--batch", type=int, default=64)
    schedule.add_argument("--lr", type=float, default=5e-3)
    schedule.add_argument("--warmup", type=float, default=0.1, help="share of the steps")
    schedule.add_argument("--weight-decay", type=float, default=0.1)
    schedule.add_argument("--label-smoothing", type=float, default=0.1)
    schedule.add_argument("--shift", type=int, default=6, help="pixels of the largest shift")
    adapters = parser.add_argument_group("adapters")
    adapters.add_argument("--experts", type=int, default=4)
    adapters.add_argument("--ranks", type=numbers, default=[8, 8, 16], help="of one expert, by stage")
    adapters.add_argument("--alpha", type=float, default=4)
    adapters.add_argument(
        "--layers", default=r".*encoder.*convolution", help="regular expression of the adapted layers"
    )
    adapters.add_argument("--router-side", type=int, default=12, help="pixels of the image that the router sees")
    adapters.add_argument("--decorrelation", type=float, default=0.1, help="weight of the loss of mola-router+twd")
    adapters.add_argument("--adapter-lr", type=float, default=1, help="times --lr")
    adapters.add_argument("--adapter-weight-decay", type=float, default=0.05)
    options = parser.parse_args()
    unknown = set(options.methods) - set(METHODS)
    if unknown:
        parser.error(f"--methods {','.join(sorted(unknown))}: the methods are {', '.join(METHODS)}")
    return options


def main() -> None:
    options = parse()
    os.environ["OMP_NUM_THREADS"] = "1"  # before the workers start
    runs = []
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
        waiting = [
            pool.submit(train_and_evaluate, method, seed, options)
            for seed in options.seeds
            for method in options.methods
        ]
        for finished in as_completed(waiting):
            runs.append(finished.result())
            shown = ", ".join(f"{name} {value * 100:.1f}" for name, value in runs[-1]["accuracy"].items())
            print(
                f"{runs[-1]['method']}, seed {runs[-1]['seed']}: {shown} ({runs[-1]['training_s']:.0f} s)", flush=True
            )
    costs = seconds_per_step(options) if options.timing_rounds else {}
    table = summarise(runs, costs, options)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    print(markdown(table))
    if options.output:
        del settings["data"], settings["output"]
        options.output.parent.mkdir(parents=True, exist_ok=True)
        results = {"settings": settings, "torch": torch.__version__, "methods": table, "runs": runs}
        options.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
