"""What a step with the gradient cache needs in memory and time, against the plain step, as the batch grows.

    python benchmarks/grad_cache.py [--chunk 64] [--factors 1,4,16] [--repeats 3] [--output FILE.json]
    python benchmarks/grad_cache.py --device cuda --chunk 1024 --factors 1,4,16

A small ViT CLIP (from its configuration, 64 px) trains on random pairs: forward, backward and AdamW. With the cache no
more than `--chunk` pairs go through the model at a time; the plain step takes the batch, a multiple of that, at once.
Each figure is of a process of its own. `inputs_mib` are the pixels and tokens of the batch, which grow with it however
it is trained on; `step_mib` is the peak beyond them and beyond what stood there before: libraries, weights, gradients
and optimiser. On the CPU the peak is the high-water mark of the process, on CUDA that of torch's allocator. A plain
step that would need more than `--limit-gib`, going by the smaller one before, is left out.
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
from results_file import show_and_write
from transformers import CLIPConfig, CLIPModel

from hf_dissect.losses import ContrastiveLoss, grad_cached_backward

CONFIG = {
    "projection_dim": 128,
    "vision_config": {"image_size": 64, "patch_size": 8, "hidden_size": 128, "num_hidden_layers": 4},
    "text_config": {"hidden_size": 128, "num_hidden_layers": 4, "max_position_embeddings": 32, "vocab_size": 4096},
}
for tower in ("vision_config", "text_config"):
    CONFIG[tower] |= {"intermediate_size": 512, "num_attention_heads": 4}
FIGURES = ("step_mib", "seconds_per_step", "processor_seconds_per_step")


def random_pairs(size: int, device: str) -> dict[str, torch.Tensor]:
    """As many inputs of the model."""
    text, side = CONFIG["text_config"], CONFIG["vision_config"]["image_size"]
    tokens = torch.randint(3, text["vocab_size"], (size, text["max_position_embeddings"]), device=device)
    return {"pixel_values": torch.randn(size, 3, side, side, device=device), "input_ids": tokens}


def take_step(model: CLIPModel, optimizer: torch.optim.Optimizer, inputs: dict, chunk_size: int | None) -> None:
    """One update; plain where there is no chunk size."""
    contrastive_loss = ContrastiveLoss()
    if chunk_size is None:
        contrastive_loss(model(**inputs)).backward()
    else:
        grad_cached_backward(
            model,
            inputs,
            lambda outputs, scale, bias: contrastive_loss(outputs, scale=scale, bias=bias),
            chunk_size=chunk_size,
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)  # the gradients stay allocated, so that they are in none of the peaks


def peak_mib(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def measure(batch: int, chunk_size: int | None, steps: int, device: str) -> dict[str, float]:
    """Peak and time of some steps, in this process."""
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(**CONFIG)).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    take_step(model, optimizer, random_pairs(2, device), None)
    before = peak_mib(device)
    inputs = random_pairs(batch, device)
    inputs_mib = sum(value.nbytes for value in inputs.values()) / 2**20
    start = time.perf_counter(), time.process_time()
    for _ in range(steps):
        take_step(model, optimizer, inputs, chunk_size)
    peak = peak_mib(device)
    return {
        "inputs_mib": inputs_mib,
        "step_mib": peak - before - inputs_mib,
        "seconds_per_step": (time.perf_counter() - start[0]) / steps,
        "processor_seconds_per_step": (time.process_time() - start[1]) / steps,
    }


def measure_apart(batch: int, chunk_size: int | None) -> dict[str, float]:
    command = [sys.executable, *sys.argv, "--only", f"{batch},{chunk_size or 0}"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def repeated(batch: int, chunk_size: int | None, repeats: int) -> dict[str, float]:
    """Mean and range of several processes."""
    runs = [measure_apart(batch, chunk_size) for _ in range(repeats)]
    summary = {"batch": batch, "inputs_mib": runs[0]["inputs_mib"]}
    for name in FIGURES:
        values = [run[name] for run in runs]
        summary[name] = {"mean": statistics.mean(values), "min": min(values), "max": max(values)}
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--factors", default="1,4,16", help="sizes of the batch, in chunks")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1, help="in each process")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit-gib", type=float, default=10)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.only:
        batch, chunk_size = map(int, options.only.split(","))
        print(json.dumps(measure(batch, chunk_size or None, options.steps, options.device)))
        return

    results = {
        "chunk": options.chunk,
        "device": options.device,
        "threads": options.threads,
        "torch": torch.__version__,
    }
    results |= {"repeats": options.repeats, "steps": options.steps}
    for name, chunk_size in (("grad_cache", options.chunk), ("plain", None)):
        results[name], mib_per_pair = {}, 0.0
        for factor in map(int, options.factors.split(",")):
            batch = options.chunk * factor
            if chunk_size is None and mib_per_pair * batch > options.limit_gib * 2**10:
                print(f"{name:10} batch {batch:6}  left out: about {mib_per_pair * batch / 2**10:.1f} GiB", flush=True)
                continue
            row = results[name][f"{factor}x"] = repeated(batch, chunk_size, options.repeats)
            mib_per_pair = row["step_mib"]["mean"] / batch
            shown = ", ".join(f"{figure} {row[figure]['mean']:.2f}" for figure in FIGURES)
            print(f"{name:10} batch {batch:6}  inputs_mib {row['inputs_mib']:.1f}, {shown}", flush=True)
    show_and_write(results, options.output)


if __name__ == "__main__":
    main()
