"""Which network should route by pixels? Cost and quality of small ones, on real pictures of several tasks or domains.

    python benchmarks/mola_router.py --tasks tasks32 --pacs PACS --output FILE.json

The folder of `--tasks` holds npz files with the arrays NAME/image (uint8, n x 32 x 32 x 3) and NAME/split (0 train, 1
validation), that of `--pacs` train.parquet and validation.parquet (columns `image`, `domain`). All pictures have 32
pixels. Each network has as many scores as there are tasks, and learns them on batches of pictures, once from each of
two losses:

    labels           cross-entropy of the scores: what the network can learn
    decorrelation    the task-wise decorrelation loss of MoLA on the projected scores: what it learns as a router

Accuracy is that of the nearest task on validation pictures: by the largest score, or by the mean routing weights of
the training pictures of each task. `decorrelation` is the loss on validation pictures. Costs are processor times,
forward and backward, in turns: `ms` of the network alone on 32 pictures, `step` of a small ResNet for 64 pixels with a
MoLA router as a multiple of that with LoRA of as many parameters (`mola_cost.py --model small-resnet`).
"""

import argparse
import functools
import io
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import mola_cost
import numpy as np
import torch
import torch.nn.functional as F
from peft import get_peft_model
from PIL import Image
from results_file import show_and_write
from torch import nn

from hf_dissect.mola import MolaConfig, PixelRouter, register_router
from hf_dissect.mola.decorrelation import decorrelation_loss

SIDE = 32
LOSSES = ("labels", "decorrelation")
Pictures = dict[str, tuple[torch.Tensor, torch.Tensor]]


class Convolutions(nn.Sequential):
    """Three convolutions, each of which halves the image."""

    def __init__(self, num_experts: int):
        widths = (3, 16, 32, 64)
        layers = []
        for inner, outer in zip(widths, widths[1:], strict=False):
            layers += [nn.Conv2d(inner, outer, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(outer), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], num_experts))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        side = min(SIDE, pixel_values.shape[-1])
        return super().forward(F.adaptive_avg_pool2d(pixel_values, side))


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "resnet20": lambda experts: PixelRouter(experts, architecture="resnet20"),
    "resnet20-16px": lambda experts: PixelRouter(experts, image_size=16, architecture="resnet20"),
    "resnet8": lambda experts: PixelRouter(experts, architecture="resnet8"),
    "convolutions": Convolutions,
}


def read_tasks(folder: Path) -> Pictures:
    """Pictures, uint8 (n, 3, 32, 32), and tasks of the training and validation splits of all tasks in a folder."""
    parts: dict[str, list] = {"train": [], "validation": []}
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as arrays:
            for name in sorted(name for name in arrays.files if name.endswith("/image")):
                image, split = arrays[name], arrays[name.replace("/image", "/split")]
                for number, part in enumerate(parts.values()):
                    part.append(torch.from_numpy(image[split == number]).permute(0, 3, 1, 2))
    return {split: (torch.cat(part), number_of_each(part)) for split, part in parts.items()}


def number_of_each(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.repeat_interleave(torch.arange(len(parts)), torch.tensor([len(part) for part in parts]))


def read_domains(folder: Path) -> Pictures:
    """The same of the domains of PACS."""
    found = {}
    for split in ("train", "validation"):
        rows = datasets.Dataset.from_parquet(str(folder / f"{split}.parquet"))
        images = np.empty((len(rows), SIDE, SIDE, 3), np.uint8)
        for place, image in enumerate(rows.cast_column("image", datasets.Image(decode=False))["image"]):
            with Image.open(io.BytesIO(image["bytes"])) as opened:
                images[place] = opened.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)
        found[split] = (torch.from_numpy(images).permute(0, 3, 1, 2), torch.tensor(rows["domain"]))
    return found


def train(name: str, loss_name: str, pictures: Pictures, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """Train a network to tell the tasks apart, and measure it on the validation pictures."""
    images, tasks = pictures["train"]
    sample = images[::7].float()
    mean, deviation = sample.mean((0, 2, 3))[:, None, None], sample.std((0, 2, 3))[:, None, None]
    rows_of = [(tasks == task).nonzero()[:, 0] for task in range(int(tasks.max()) + 1)]
    torch.manual_seed(seed)
    network = NETWORKS[name](len(rows_of)).train()
    projection = nn.Linear(len(rows_of), 32, bias=False)
    parameters = [*network.parameters(), *projection.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=options.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=options.steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(options.steps):
        drawn = torch.randint(len(rows_of), (options.batch,), generator=generator)
        places = torch.rand(options.batch, generator=generator)
        rows = torch.stack(
            [rows_of[task][int(at * len(rows_of[task]))] for task, at in zip(drawn, places, strict=True)]
        )
        scores = network((images[rows] - mean) / deviation)
        made = (
            decorrelation_loss(projection(scores), drawn) if loss_name != "labels" else F.cross_entropy(scores, drawn)
        )
        optimizer.zero_grad()
        made.backward()
        optimizer.step()
        schedule.step()
    network.eval()
    with torch.no_grad():
        found = {}
        for split, (own, _) in pictures.items():
            chosen = own[:: max(1, len(own) // 2000)]
            found[split] = torch.cat([network((part - mean) / deviation) for part in chosen.split(256)])
        kept = {split: own[:: max(1, len(own) // 2000)] for split, (_, own) in pictures.items()}
        held_out = kept["validation"]
        if loss_name == "labels":
            best = found["validation"].argmax(1)
        else:
            weights = {split: scores.softmax(1) for split, scores in found.items()}
            centres = [weights["train"][kept["train"] == task].mean(0) for task in range(len(rows_of))]
            best = torch.cdist(weights["validation"], torch.stack(centres)).argmin(1)
        by_task = [(best[held_out == task] == task).float().mean().item() for task in held_out.unique()]
        result = {"accuracy": statistics.mean(by_task)}
        if loss_name != "labels":
            order = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))
            parts = [part for part in order.split(options.batch) if len(part) == options.batch]
            values = [decorrelation_loss(projection(found["validation"][part]), held_out[part]) for part in parts]
            result["decorrelation"] = torch.stack(values).mean().item()
    return result


def adapt(name: str, experts: int, r: int, model_name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The base of mola_cost.py with one of the networks as its router, and its inputs."""
    model, inputs = mola_cost.build(model_name)
    register_router(f"{name}-candidate", lambda config, _: _TakesPixels(NETWORKS[name](config.num_experts)))
    config = MolaConfig(
        num_experts=experts, r=r, target_modules=mola_cost.TARGETS["resnet"], router_input=f"{name}-candidate"
    )
    return get_peft_model(model, config).train(), inputs


class _TakesPixels(nn.Module):
    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, pixel_values: torch.Tensor, **others: torch.Tensor) -> torch.Tensor:
        return self.network(pixel_values)


def measure_costs(options: argparse.Namespace) -> dict[str, dict]:
    """Processor time of each network by itself, and of a step of a small ResNet with it."""
    alone = {name: NETWORKS[name](options.experts).train() for name in options.networks}
    pictures = torch.randn(32, 3, SIDE, SIDE)

    def score_and_return(network: nn.Module) -> None:
        network(pictures).square().mean().backward()

    steps = {name: functools.partial(score_and_return, network) for name, network in alone.items()}
    lora = mola_cost.adapt("lora_Er", options.base, options.experts, 8)
    steps["lora"] = functools.partial(mola_cost.step, *lora)
    for name in options.networks:
        steps[f"{name} in a step"] = functools.partial(mola_cost.step, *adapt(name, options.experts, 8, options.base))
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(options.rounds + 1):
        for name in [*steps][:: (-1) ** turn]:
            start = time.process_time()
            steps[name]()
            if turn:
                seconds[name].append(time.process_time() - start)
    return {
        name: {
            "parameters": sum(part.numel() for part in alone[name].parameters()),
            "ms": 1000 * statistics.median(seconds[name]),
            "step": statistics.median(
                own / other for own, other in zip(seconds[f"{name} in a step"], seconds["lora"], strict=True)
            ),
        }
        for name in options.networks
    }


def summarise(runs: list[dict]) -> dict[str, dict]:
    """Mean and sample deviation over the seeds, by data and loss."""
    table: dict[str, dict] = {}
    for run in runs:
        cell = table.setdefault(f"{run['data']}, {run['loss']}", {})
        for figure in ("accuracy", "decorrelation"):
            if figure in run:
                cell.setdefault(figure, []).append(run[figure])
    return {
        place: {
            figure: {
                "mean": statistics.mean(values),
                "deviation": statistics.stdev(values) if len(values) > 1 else None,
            }
            for figure, values in cell.items()
        }
        for place, cell in table.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=Path, help="folder of npz files")
    parser.add_argument("--pacs", type=Path, help="folder with train.parquet and validation.parquet")
    parser.add_argument("--networks", type=lambda text: text.split(","), default=list(NETWORKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--rounds", type=int, default=9, help="of the measurement of costs")
    parser.add_argument("--base", default="small-resnet", choices=("small-resnet", "resnet", "tiny-resnet"))
    parser.add_argument("--experts", type=int, default=4, help="of the adapters whose cost is measured")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = {}
    if options.tasks:
        data["tasks"] = read_tasks(options.tasks)
    if options.pacs:
        data["pacs"] = read_domains(options.pacs)
    results = {"steps": options.steps, "batch": options.batch, "lr": options.lr, "torch": torch.__version__}
    results["networks"] = measure_costs(options)
    runs = []
    for seed in options.seeds:
        for place, pictures in data.items():
            for loss in LOSSES:
                for name in options.networks:
                    start = time.process_time()
                    found = train(name, loss, pictures, seed, options)
                    runs.append({"network": name, "data": place, "loss": loss, "seed": seed, **found})
                    print(json.dumps(runs[-1]), f"{time.process_time() - start:.0f} s", flush=True)
    for name in options.networks:
        results["networks"][name] |= summarise([run for run in runs if run["network"] == name])
    show_and_write(results | {"runs": runs}, options.output)


if __name__ == "__main__":
    main()
