"""The embeddings of a trained model in sentence-transformers and open_clip, against those of the model itself.

    python benchmarks/bridges.py [--seeds 0,1,2] [--size 256] [--layers 6] [--output benchmarks/results/bridges.json]

Needs the packages of the extra `bridges`. A CLIP model of random weights and a tokenizer of scenes' captions are made
for each seed; adapters get random weights, too. Pictures and captions are those of 32 scenes. The difference
is the largest one in any embedding of unit length; the seconds are those of loading there, imports in the first.
"""

import argparse
import io
import platform
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision_operators  # noqa: F401  # before peft and transformers, which import torchvision
from peft import LoraConfig, get_peft_model
from PIL import Image
from results_file import show_and_write

from hf_dissect import MolaConfig, load_model_and_processor, make_scenes
from hf_dissect.interop.export import export_run
from hf_dissect.interop.sentence_files import write_sentence_files
from hf_dissect.models.adapters import save_base

PAIRS = 32


def make_model(seed: int, options: argparse.Namespace) -> tuple[Any, Any]:
    """A CLIP model and its processor."""
    tower = {"hidden_size": options.size, "intermediate_size": 4 * options.size, "num_hidden_layers": options.layers}
    tower["num_attention_heads"] = max(options.size // 64, 1)
    config = {
        "model_type": "clip",
        "projection_dim": options.size,
        "vision_config": {**tower, "image_size": 64, "patch_size": 16},
        "text_config": {**tower, "max_position_embeddings": 32},
    }
    torch.manual_seed(seed)
    captions = make_scenes(512, seed=seed)["caption"]
    return load_model_and_processor(config=config, captions=captions, vocab_size=1024)


def save(folder: Path, model: Any, processor: Any) -> Path:
    """Write a folder as a run does, with random weights in its adapter."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ("lora" in name or "mola_" in name):
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    save_base(model, folder)
    write_sentence_files(folder, model, processor)
    return folder


def embed(folder: Path, pictures: list, captions: list[str], pixels: torch.Tensor | None, task: int | None) -> list:
    """Embed with the model of a folder, pictures or what they were prepared to."""
    model, processor = load_model_and_processor(name_or_path=str(folder))
    tokens = processor.tokenizer(captions, padding=True, truncation=True, return_tensors="pt")
    if pixels is None:
        pixels = processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
    given = {} if task is None else {"task_ids": torch.full((len(captions),), task)}
    with torch.no_grad():
        outputs = model(pixel_values=pixels, **tokens, **given)
    return [outputs.image_embeds, outputs.text_embeds]


def read_sentence_transformers(folder: Path, **given: Any) -> Callable:
    """Load a folder in sentence-transformers; the result embeds."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu", **given)

    def encode(pictures: list, captions: list[str]) -> tuple[list, None]:
        return [model.encode(part, convert_to_tensor=True) for part in (pictures, captions)], None

    return encode


def read_open_clip(folder: Path) -> Callable:
    """Load a folder in open_clip; the result embeds, and returns the prepared pictures."""
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")

    def encode(pictures: list, captions: list[str]) -> tuple[list, torch.Tensor]:
        pixels = torch.stack([preprocess(picture) for picture in pictures])
        with torch.no_grad():
            parts = model.eval().encode_image(pixels), model.encode_text(tokenizer(captions))
        return [F.normalize(part, dim=-1) for part in parts], pixels

    return encode


def compare_all(seed: int, options: argparse.Namespace, place: Path) -> dict[str, dict[str, float]]:
    """Compare each bridge once."""
    rows = make_scenes(PAIRS, seed=seed)
    pictures = [Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB") for row in rows]
    captions = list(rows["caption"])
    results: dict[str, dict[str, float]] = {}

    def compare(name: str, read: Callable, folder: Path, mine: Path, task: int | None = None, **given: Any) -> None:
        start = time.perf_counter()
        encode = read(folder, **given)
        seconds = time.perf_counter() - start
        theirs, pixels = encode(pictures, captions)
        expected = embed(mine, pictures, captions, pixels, task)
        worst = max(float(abs(one - other).max()) for one, other in zip(theirs, expected, strict=True))
        results[name] = {"difference": worst, "seconds": seconds}

    full = save(place / "full", *make_model(seed, options))
    compare("sentence-transformers: full model", read_sentence_transformers, full, full)
    model, processor = load_model_and_processor(name_or_path=str(full))
    lora = save(place / "lora", get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"])), processor)
    compare("sentence-transformers: LoRA", read_sentence_transformers, lora, lora)
    model, processor = load_model_and_processor(name_or_path=str(full))
    experts = MolaConfig(variant="grad", num_experts=2, r=8, target_modules=["q_proj", "fc1"])
    mola = save(place / "mola", get_peft_model(model, experts), processor)
    trusted = {"trust_remote_code": True, "model_kwargs": {"task": 1}}
    compare("sentence-transformers: MoLA, by task", read_sentence_transformers, mola, mola, 1, **trusted)
    merged = export_run(mola, place / "merged", "sentence-transformers", task="1")
    compare("sentence-transformers: MoLA, task merged", read_sentence_transformers, merged, mola, 1)
    for name, source, task in (
        ("full model", full, None),
        ("LoRA, merged", lora, None),
        ("MoLA, task merged", mola, 1),
    ):
        exported = export_run(source, place / f"oc-{name}", "open_clip", task=None if task is None else str(task))
        compare(f"open_clip: {name}", read_open_clip, exported, source, task)
    compare(
        "open_clip: its folder as model.name_or_path", read_open_clip, place / "oc-full model", place / "oc-full model"
    )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--size", type=int, default=256, help="width of the towers")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    runs = []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as place:
            runs.append(compare_all(seed, options, Path(place)))
    packages = (
        "hf_dissect",
        "torch",
        "transformers",
        "peft",
        "sentence-transformers",
        "open_clip_torch",
        "torchvision",
    )
    bridges = {
        name: {
            "largest_difference": max(run[name]["difference"] for run in runs),
            "differences": [run[name]["difference"] for run in runs],
            "load_seconds": [round(run[name]["seconds"], 3) for run in runs],
        }
        for name in runs[0]
    }
    versions = {"python": platform.python_version(), **{name: version(name) for name in packages}}
    show_and_write({"seeds": seeds, "pairs": PAIRS, "versions": versions, "bridges": bridges}, options.output)


if __name__ == "__main__":
    main()
