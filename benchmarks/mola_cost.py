"""What a MoLA adapter costs, by the number of its experts, next to PEFT's LoRA, Poly and X-LoRA in one run.

Timed is forward plus backward on one batch, with the base frozen and all methods on the same layers. The methods take
turns, and the order changes each round. The processor time is what a machine that others use as well leaves
comparable; each ratio is taken within a round. The columns:

    lora_r           LoRA of rank r, what a sample needs whose expert is known
    lora_Er          LoRA of rank E * r, of as many adapter parameters as E experts
    poly             Poly with E skills of rank r (dense layers only)
    xlora            X-LoRA over E adapters of rank r, all trainable (llama only: it reads the hidden states of a
                     language model in a first forward pass of its own)
    router           MoLA, weights by the router
    grad_mixed       MoLA, one expert per sample, the tasks of a batch differ
    grad_one_task    MoLA, one expert per sample, the tasks of a batch are the same

Examples:

    python benchmarks/mola_cost.py
    python benchmarks/mola_cost.py --model llama --experts 4 32 --rounds 3
    python benchmarks/mola_cost.py --model resnet --output benchmarks/results/mola_cost_resnet.json
"""

import argparse
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PolyConfig, XLoraConfig, get_peft_model
from results_file import show_and_write
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
)

from hf_dissect import MolaConfig

# A CLIP of the size of ViT-B/32, a small Llama, a ResNet-18, and a ResNet for small images; the others are for tests.
SIZES = {
    "clip": {"hidden": 768, "layers": 12, "text_hidden": 512, "image": 224, "patch": 32, "batch": 8},
    "llama": {"hidden": 512, "layers": 8, "length": 128, "batch": 4},
    "resnet": {"hidden": 64, "layers": 2, "stages": 4, "image": 224, "batch": 8},
    "small-resnet": {"hidden": 32, "layers": 3, "stages": 3, "image": 64, "batch": 32},
    "tiny-clip": {"hidden": 32, "layers": 1, "text_hidden": 32, "image": 32, "patch": 16, "batch": 4},
    "tiny-llama": {"hidden": 32, "layers": 1, "length": 8, "batch": 4},
    "tiny-resnet": {"hidden": 8, "layers": 1, "stages": 2, "image": 32, "batch": 4},
}
TARGETS = {
    "clip": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "resnet": ["convolution"],
}
METHODS = ("lora_r", "lora_Er", "poly", "xlora", "router", "grad_mixed", "grad_one_task")


def kind_of(name: str) -> str:
    return name.rpartition("-")[2]


def methods_for(name: str) -> list[str]:
    left_out = {"clip": ["xlora"], "llama": [], "resnet": ["poly", "xlora"]}[kind_of(name)]
    return [method for method in METHODS if method not in left_out]


def build(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Build a model from its configuration, and a batch for it."""
    torch.manual_seed(0)
    size = SIZES[name]
    batch, layers = size["batch"], {"num_hidden_layers": size["layers"]}
    if kind_of(name) == "llama":
        dense = {"hidden_size": size["hidden"], "intermediate_size": 4 * size["hidden"]}
        config = LlamaConfig(**dense, **layers, vocab_size=1000, num_attention_heads=size["hidden"] // 64 or 2)
        ids = torch.randint(3, 1000, (batch, size["length"]))
        labels = ids.clone()
        labels[:, : size["length"] // 2] = -100  # the prompt
        config.use_cache = False  # as X-LoRA requires
        return LlamaForCausalLM(config), {"input_ids": ids, "labels": labels}
    pixels = torch.randn(batch, 3, size["image"], size["image"])
    if kind_of(name) == "resnet":
        widths = [size["hidden"] * 2**stage for stage in range(size["stages"])]
        depths = [size["layers"]] * size["stages"]
        config = ResNetConfig(embedding_size=size["hidden"], hidden_sizes=widths, depths=depths, layer_type="basic")
        return ResNetForImageClassification(config), {"pixel_values": pixels}
    vision = {"hidden_size": size["hidden"], "intermediate_size": 4 * size["hidden"], "image_size": size["image"]}
    text = {"hidden_size": size["text_hidden"], "intermediate_size": 4 * size["text_hidden"]}
    vision |= {**layers, "patch_size": size["patch"], "num_attention_heads": size["hidden"] // 16}
    text |= {**layers, "vocab_size": 1000, "num_attention_heads": size["text_hidden"] // 16, "eos_token_id": 2}
    model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text))
    return model, {"pixel_values": pixels, "input_ids": torch.randint(3, 1000, (batch, 32))}


def adapt(method: str, name: str, num_experts: int, r: int) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Build a model with the adapter of one method, and its inputs."""
    model, inputs = build(name)
    targets = TARGETS[kind_of(name)]
    tasks = torch.arange(SIZES[name]["batch"]) % num_experts
    if method.startswith("lora"):
        config = LoraConfig(r=r if method == "lora_r" else num_experts * r, target_modules=targets)
    elif method == "poly":
        config = PolyConfig(r=r, n_tasks=num_experts, n_skills=num_experts, target_modules=targets)
        inputs["task_ids"] = tasks
        return get_peft_model(model, config).train().base_model, inputs  # a plain PeftModel hands it no task_ids
    elif method == "xlora":
        return adapt_by_xlora(model, num_experts, r, targets), inputs
    else:
        variant = method.partition("_")[0]
        config = MolaConfig(variant=variant, num_experts=num_experts, r=r, target_modules=targets)
        if variant == "grad":
            inputs["task_ids"] = tasks if method == "grad_mixed" else torch.zeros_like(tasks)
    return get_peft_model(model, config).train(), inputs


def adapt_by_xlora(model: nn.Module, num_experts: int, r: int, targets: list[str]) -> nn.Module:
    """Load E saved adapters, as X-LoRA requires, from a folder of this run."""
    with tempfile.TemporaryDirectory() as folder:
        get_peft_model(build_like(model), LoraConfig(r=r, target_modules=targets)).save_pretrained(folder)
        adapters = {str(expert): folder for expert in range(num_experts)}
        fields = {"task_type": "CAUSAL_LM", "hidden_size": model.config.hidden_size, "use_trainable_adapters": True}
        return get_peft_model(model, XLoraConfig(adapters=adapters, **fields)).train()


def build_like(model: nn.Module) -> nn.Module:
    return type(model)(model.config)


def step(model: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    outputs = model(**inputs)
    if (loss := outputs.get("loss")) is None:
        output = outputs["logits"] if "logits" in outputs else outputs["logits_per_text"]
        loss = output.square().mean()
    loss.backward()


def measure(options: argparse.Namespace, num_experts: int) -> dict[str, dict[str, float]]:
    """Measure the processor seconds of a step of each method, and its ratio to both ranks of LoRA."""
    methods = methods_for(options.model)
    models = {method: adapt(method, options.model, num_experts, options.r) for method in methods}
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    for round_number in range(options.rounds + 1):
        turn = round_number % len(methods)
        for method in methods[turn:] + methods[:turn]:
            start = time.process_time()
            step(*models[method])
            if round_number:  # the first round warms caches up
                seconds[method].append(time.process_time() - start)
            if method == "xlora":  # whose memory the next method would have to clear up
                step(*models["lora_r"])
    results = {}
    for method in methods:
        ratios = {
            name: [own / other for own, other in zip(seconds[method], seconds[name], strict=True)]
            for name in ("lora_r", "lora_Er")
        }
        results[method] = {
            "trainable_parameters": sum(p.numel() for p in models[method][0].parameters() if p.requires_grad),
            "s_per_step_median": statistics.median(seconds[method]),
            **{f"ratio_to_{name}_median": statistics.median(values) for name, values in ratios.items()},
            **{f"ratio_to_{name}_range": [min(values), max(values)] for name, values in ratios.items()},
        }
        print(
            f"E = {num_experts:2}  {method:14} {results[method]['s_per_step_median']:.3f} s, "
            f"{statistics.median(ratios['lora_r']):.2f} of LoRA r, {statistics.median(ratios['lora_Er']):.2f} of E r",
            flush=True,
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(SIZES), default="clip")
    parser.add_argument("--experts", type=int, nargs="+", default=[2, 4, 8, 16, 32], help="numbers of experts")
    parser.add_argument("--r", type=int, default=8, help="rank of an expert")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", category=UserWarning)

    results = {name: getattr(options, name) for name in ("model", "r", "rounds", "threads")}
    results |= {"size": SIZES[options.model], "torch": torch.__version__}
    results["experts"] = {str(num_experts): measure(options, num_experts) for num_experts in options.experts}
    show_and_write(results, options.output)


if __name__ == "__main__":
    main()
