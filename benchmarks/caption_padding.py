"""What padding of captions costs, and what batches of captions of similar length would save of a step.

    python benchmarks/caption_padding.py --data /data/flickr8k/train.parquet [--seeds 0,1,2]
                                         [--output benchmarks/results/caption_padding.json]

The captions of a Parquet file (column `captions` or `caption`), with a BPE vocabulary trained on them, in random
batches padded to the longest caption, in the same batches padded to the few lengths of a compiled model, and in
batches of similar length (the sampler of transformers, `group_by_length`). Then the time of a training step of CLIP
with ViT-B/32 and ViT-B/16 from scratch at the mean length of each kind, in turns, on few pairs.
"""

import argparse
import statistics
import time
from pathlib import Path

import pyarrow.parquet as pq
import torch
from results_file import show_and_write
from transformers import CLIPConfig, CLIPModel
from transformers.trainer_pt_utils import LengthGroupedSampler

from hf_dissect.data.caption_lengths import choose_caption_lengths
from hf_dissect.models.tokenizer_training import train_tokenizer

LIMIT = 77


def count_tokens(path: Path) -> list[int]:
    """Return the number of tokens of each caption, special tokens included."""
    name = "captions" if "captions" in pq.read_schema(path).names else "caption"
    rows = pq.read_table(path, columns=[name]).column(name).to_pylist()
    captions = [text for row in rows for text in (row if isinstance(row, list) else [row])]
    tokenizer = train_tokenizer(captions, "clip_text_model", 4096)
    return [min(len(tokens), LIMIT) for tokens in tokenizer(captions)["input_ids"]]


def measure_lengths(lengths: list[int], batch: int, seed: int) -> dict[str, float]:
    """Return the mean length of a padded batch for each kind of batches."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    grouped = list(LengthGroupedSampler(batch, lengths=lengths, generator=generator))
    few = choose_caption_lengths(None, LIMIT, "longest", is_compiled=True)

    def longest(rows: list[int]) -> list[int]:
        return [max(lengths[row] for row in rows[k : k + batch]) for k in range(0, len(rows) - batch + 1, batch)]

    return {
        "longest": statistics.mean(longest(order)),
        "few lengths": statistics.mean(next(step for step in few if step >= length) for length in longest(order)),
        "grouped": statistics.mean(longest(grouped)),
    }


def measure_steps(patch: int, lengths: dict[str, float], pairs: int, rounds: int, tiny: bool) -> dict[str, float]:
    """Return the time of a step by the kind of batches, divided by that of random batches."""
    torch.manual_seed(0)
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {"patch_size": patch, **(small if tiny else {})}
    model = CLIPModel(CLIPConfig(text_config=small if tiny else {}, vision_config=vision)).train()
    pixels, seconds = torch.randn(pairs, 3, 224, 224), {name: [] for name in lengths}
    for number in range(rounds + 1):
        for name in [*lengths][number % 3 :] + [*lengths][: number % 3]:
            length = round(lengths[name])
            tokens = {
                "input_ids": torch.randint(5, 4000, (pairs, length)),
                "attention_mask": torch.ones(pairs, length, dtype=torch.int64),
            }
            start = time.process_time()
            model(pixel_values=pixels, **tokens, return_loss=True).loss.backward()
            seconds[name].append(time.process_time() - start)
            model.zero_grad()
    ratios = {
        name: [own / plain for own, plain in zip(values[1:], seconds["longest"][1:], strict=True)]
        for name, values in seconds.items()
    }
    return {name: round(statistics.median(values), 3) for name, values in ratios.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--batches", default="64,256,1024")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)

    lengths = count_tokens(options.data)
    measured = {"pairs_a_step": options.pairs, "rounds": options.rounds}
    results: dict[str, object] = {
        **measured,
        "captions": len(lengths),
        "mean_tokens": round(statistics.mean(lengths), 2),
    }
    for batch in map(int, options.batches.split(",")):
        runs = [measure_lengths(lengths, batch, int(seed)) for seed in options.seeds.split(",")]
        means = {name: statistics.mean(run[name] for run in runs) for name in runs[0]}
        spread = {name: max(run[name] for run in runs) - min(run[name] for run in runs) for name in runs[0]}
        steps = {
            f"ViT-B/{patch}": measure_steps(patch, means, options.pairs, options.rounds, options.tiny)
            for patch in (32, 16)
        }
        results[f"batch of {batch}"] = {
            "padded_length": {name: round(value, 2) for name, value in means.items()},
            "spread_over_seeds": {name: round(value, 2) for name, value in spread.items()},
            "step_relative_to_longest": steps,
        }
    show_and_write(results, options.output)


if __name__ == "__main__":
    main()
