"""What a training step costs with selection, against the plain Trainer, in one run.

    python benchmarks/step_overhead.py [--rounds 5] [--steps 20] [--variants "none;random"]
                                       [--output benchmarks/results/step_overhead.json]

The same CLIP (from scratch, 64 px), data and batch size throughout. The trainers take turns, and the order changes
each round, so a machine that gets slower or faster meanwhile does so for all. Both the wall-clock and the processor
time of `train()`, data included, are given: the second is what a machine that others use as well leaves comparable.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from results_file import show_and_write
from transformers import Trainer, TrainingArguments

from hf_dissect import DissectTrainer, DissectTrainingArguments, load_model_and_processor, make_scenes
from hf_dissect.data import as_pairs
from hf_dissect.data.pairs import PAIR_KEYS
from hf_dissect.data_collator import SelectionCollator

CONFIG = {
    "model_type": "clip",
    "projection_dim": 128,
    "vision_config": {"image_size": 64, "patch_size": 8, "hidden_size": 128, "num_hidden_layers": 4},
    "text_config": {"hidden_size": 128, "num_hidden_layers": 3, "max_position_embeddings": 32},
}
for tower in ("vision_config", "text_config"):
    CONFIG[tower] |= {"intermediate_size": 512, "num_attention_heads": 4}
VARIANTS = {
    "plain Trainer": None,
    "none": {"selection_strategy": "none"},
    "none, averaged weights": {"selection_strategy": "none", "average_weights": 1.0},
    "random": {"selection_strategy": "random"},
    "small_loss": {"selection_strategy": "small_loss"},
    "dissect": {"selection_strategy": "dissect", "selection_options": {"variant": "momentum"}},
}


class PlainCollator:
    """The model's inputs and `return_loss`, as a user of the plain Trainer passes them."""

    def __init__(self, collate: SelectionCollator):
        self.collate = collate

    def __call__(self, rows):
        batch = self.collate(rows)
        return {**{key: value for key, value in batch.items() if key not in PAIR_KEYS}, "return_loss": True}


def seconds_per_step(variant: dict | None, rows, batch_size: int, steps: int) -> dict[str, float]:
    """Train a fresh model for some steps."""
    torch.manual_seed(0)
    model, processor = load_model_and_processor(config=CONFIG, captions=rows["caption"])
    settings = dict(
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        if variant is None:
            arguments = TrainingArguments(folder, remove_unused_columns=False, dataloader_pin_memory=False, **settings)
            collate = PlainCollator(SelectionCollator(processor))
            trainer = Trainer(model=model, args=arguments, train_dataset=as_pairs(rows), data_collator=collate)
        else:
            arguments = DissectTrainingArguments(folder, save_run_folder=False, **variant, **settings)
            trainer = DissectTrainer(model=model, args=arguments, train_dataset=rows, processing_class=processor)
        start = time.perf_counter(), time.process_time()
        trainer.train()
        return {
            "wall": (time.perf_counter() - start[0]) / steps,
            "processor": (time.process_time() - start[1]) / steps,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--variants", help="names, separated by semicolons; all without it")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    rows = make_scenes(options.batch * 8, image_size=64)
    names = list(VARIANTS) if options.variants is None else ["plain Trainer", *options.variants.split(";")]
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for round_number in range(options.rounds + 1):
        for name in names[round_number % len(names) :] + names[: round_number % len(names)]:
            elapsed = seconds_per_step(VARIANTS[name], rows, options.batch, options.steps)
            if round_number:  # the first round warms caches up
                seconds[name].append(elapsed)
                shown = ", ".join(f"{clock} {value * 1000:.1f} ms" for clock, value in elapsed.items())
                print(f"round {round_number}  {name:22} {shown} a step", flush=True)
    results = {"batch": options.batch, "steps": options.steps, "threads": options.threads, "torch": torch.__version__}
    for name, values in seconds.items():
        results[name] = {}
        for clock in ("wall", "processor"):
            pairs = zip(values, seconds["plain Trainer"], strict=True)
            ratios = [own[clock] / plain[clock] for own, plain in pairs]
            results[name][clock] = {
                "ms_per_step_median": statistics.median(value[clock] for value in values) * 1000,
                "ratio_to_plain_median": statistics.median(ratios),
                "ratio_to_plain_min": min(ratios),
                "ratio_to_plain_max": max(ratios),
            }
    show_and_write(results, options.output)


if __name__ == "__main__":
    main()
