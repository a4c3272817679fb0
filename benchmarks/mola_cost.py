"""What a MoLA adapter costs, against PEFT's LoRA of the same number of adapter parameters, in one run.

    python benchmarks/mola_cost.py [--model clip|resnet] [--experts 4] [--r 8] [--rounds 10] [--output FILE.json]

LoRA gets the rank E * r, MoLA E experts of rank r, on the same layers of the same model (from its configuration, base
frozen). Timed is forward plus backward on the same batch; the adapters take turns, and the order changes each round.
The processor time is what a machine that others use as well leaves comparable. Peak memory is that of a process of
its own for each adapter: what a step adds to the model (`step_mib`), and the whole process (`process_mib`).
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from results_file import show_and_write
from torch import nn
from transformers import CLIPConfig, CLIPModel, ResNetConfig, ResNetForImageClassification

from hf_dissect import MolaConfig

ADAPTERS = ("lora", "mola-router", "mola-grad")
SIZES = {
    "clip": {"hidden": 768, "layers": 12, "text_hidden": 512, "image": 224, "patch": 32},
    "resnet": {"hidden": 64, "layers": 2, "image": 224},
    "tiny-clip": {"hidden": 32, "layers": 1, "text_hidden": 32, "image": 32, "patch": 16},
    "tiny-resnet": {"hidden": 8, "layers": 1, "image": 32},
}
TARGETS = {"clip": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"], "resnet": ["convolution"]}


def build(name: str, batch: int) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A model of the size of a ViT-B/32 CLIP or of a ResNet-18, for images of 224 px, and a batch for it."""
    torch.manual_seed(0)
    size = SIZES[name]
    pixels = torch.randn(batch, 3, size["image"], size["image"])
    if name.endswith("resnet"):
        widths = [size["hidden"] * 2**stage for stage in range(4)]
        config = ResNetConfig(
            embedding_size=size["hidden"], hidden_sizes=widths, depths=[size["layers"]] * 4, layer_type="basic"
        )
        return ResNetForImageClassification(config), {"pixel_values": pixels}
    layers = {"num_hidden_layers": size["layers"]}
    vision = {"hidden_size": size["hidden"], "intermediate_size": 4 * size["hidden"], "image_size": size["image"]}
    text = {"hidden_size": size["text_hidden"], "intermediate_size": 4 * size["text_hidden"]}
    vision |= {**layers, "patch_size": size["patch"], "num_attention_heads": size["hidden"] // 16}
    text |= {**layers, "vocab_size": 1000, "num_attention_heads": size["text_hidden"] // 16, "eos_token_id": 2}
    model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text))
    return model, {"pixel_values": pixels, "input_ids": torch.randint(3, 1000, (batch, 32))}


def adapted(adapter: str, options: argparse.Namespace) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    model, inputs = build(options.model, options.batch)
    targets = TARGETS[options.model.removeprefix("tiny-")]
    if adapter == "lora":
        config = LoraConfig(r=options.experts * options.r, target_modules=targets)
    else:
        variant = adapter.removeprefix("mola-")
        config = MolaConfig(variant=variant, num_experts=options.experts, r=options.r, target_modules=targets)
    if adapter == "mola-grad":
        inputs["task_ids"] = torch.arange(options.batch) % options.experts
    return get_peft_model(model, config).train(), inputs


def step(model: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    outputs = model(**inputs)
    output = outputs["logits"] if "logits" in outputs else outputs["logits_per_text"]
    output.square().mean().backward()


def measure_time(options: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Seconds a step, round by round."""
    models = {adapter: adapted(adapter, options) for adapter in ADAPTERS}
    seconds: dict[str, list[dict[str, float]]] = {adapter: [] for adapter in ADAPTERS}
    for round_number in range(options.rounds + 1):
        turn = round_number % len(ADAPTERS)
        for adapter in ADAPTERS[turn:] + ADAPTERS[:turn]:
            start = time.perf_counter(), time.process_time()
            step(*models[adapter])
            wall, processor = time.perf_counter() - start[0], time.process_time() - start[1]
            if round_number:  # the first round warms caches up
                seconds[adapter].append({"wall": wall, "processor": processor})
                print(f"round {round_number}  {adapter:12} wall {wall:.3f} s, processor {processor:.3f} s", flush=True)
    return seconds


def measure_memory(adapter: str, options: argparse.Namespace) -> dict[str, float]:
    """Peak of this process, which must do nothing else."""
    model, inputs = adapted(adapter, options)
    with open("/proc/self/statm") as statm:
        before = int(statm.read().split()[1]) * resource.getpagesize() / 2**20
    for _ in range(2):
        step(model, inputs)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return {"process_mib": peak, "step_mib": peak - before}


def measure_memory_apart(adapter: str) -> dict[str, float]:
    command = [sys.executable, *sys.argv, "--memory-of", adapter]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(SIZES), default="clip")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--memory-of", choices=ADAPTERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        print(json.dumps(measure_memory(options.memory_of, options)))
        return

    memory = {adapter: measure_memory_apart(adapter) for adapter in ADAPTERS}
    seconds = measure_time(options)
    results = {name: getattr(options, name) for name in ("model", "experts", "r", "batch", "rounds", "threads")}
    results["torch"] = torch.__version__
    for adapter in ADAPTERS:
        parameters = adapted(adapter, options)[0].get_nb_trainable_parameters()[0]
        results[adapter] = {"trainable_parameters": parameters, **memory[adapter]}
        for measure in memory["lora"]:
            results[adapter][f"{measure}_ratio"] = memory[adapter][measure] / memory["lora"][measure]
        for clock in ("wall", "processor"):
            pairs = zip(seconds[adapter], seconds["lora"], strict=True)
            ratios = [own[clock] / lora[clock] for own, lora in pairs]
            results[adapter][clock] = {
                "s_per_step_median": statistics.median(value[clock] for value in seconds[adapter]),
                "ratio_to_lora_median": statistics.median(ratios),
                "ratio_to_lora_min": min(ratios),
                "ratio_to_lora_max": max(ratios),
            }
    show_and_write(results, options.output)


if __name__ == "__main__":
    main()
