"""What `training.torch_compile` gains in a step with selection, and what it costs until all graphs are there.

    python benchmarks/compiled_steps.py [--rounds 5] [--steps 30] [--output benchmarks/results/compiled_steps.json]

One CLIP from scratch, the same batches of captions of many lengths, and four ways: as it is, with captions padded to a
few lengths, compiled with captions of any length (torch makes graphs of unknown sizes after the first), and compiled
with few lengths. The ways take turns within a round, so that a machine that gets slower does so for all of them. A
step is scoring, selection, forward and backward pass and optimiser; the first pass over the batches, in which the
graphs are made, counts apart.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from results_file import show_and_write

from hf_dissect import DissectTrainer, DissectTrainingArguments, load_model_and_processor, make_scenes

CONFIG = {
    "model_type": "clip",
    "projection_dim": 128,
    "vision_config": {"image_size": 64, "patch_size": 8, "hidden_size": 128, "num_hidden_layers": 4},
    "text_config": {"hidden_size": 128, "num_hidden_layers": 3, "max_position_embeddings": 77},
}
for tower in ("vision_config", "text_config"):
    CONFIG[tower] |= {"intermediate_size": 512, "num_attention_heads": 4}
WAYS = {
    "eager": {},
    "eager, few lengths": {"caption_lengths": [16, 32, 64]},
    "compiled, any length": {"torch_compile": True, "caption_lengths": []},
    "compiled, few lengths": {"torch_compile": True, "caption_lengths": [16, 32, 64]},
}


def lengthen(rows, seed: int = 0):
    """Return the rows with captions of about 6 to 70 tokens, as many words as a log-normal number says."""
    generator, words = np.random.default_rng(seed), sorted({word for text in rows["caption"] for word in text.split()})
    counts = np.exp(generator.normal(np.log(12), 0.5, len(rows))).clip(4, 70).astype(int)
    captions = [" ".join(generator.choice(words, count)) for count in counts]
    return rows.remove_columns("caption").add_column("caption", captions)


class Steps:
    """Steps of one way over a list of batches, without the loading."""

    def __init__(self, settings: dict, rows, options: argparse.Namespace, folder: str) -> None:
        torch.manual_seed(0)
        model, processor = load_model_and_processor(config=CONFIG, captions=rows["caption"])
        arguments = DissectTrainingArguments(
            folder,
            selection_strategy="small_loss",
            per_device_train_batch_size=options.batch,
            max_steps=10**6,
            save_strategy="no",
            save_run_folder=False,
            report_to="none",
            disable_tqdm=True,
            check_reload=False,
            torch_compile_backend=options.backend if settings.get("torch_compile") else None,
            **{name: value for name, value in settings.items() if name != "torch_compile"},
        )
        self.trainer = DissectTrainer(model=model, args=arguments, train_dataset=rows, processing_class=processor)
        loader = self.trainer.get_train_dataloader()
        self.batches = [batch for batch, _ in zip(loader, range(options.steps), strict=False)]
        self.model, _ = self.trainer._prepare_for_training(10**6, loader, None)
        self.model.train()
        self.trainer.current_gradient_accumulation_steps = 1
        self.trainer.enter_epoch(1)

    def run(self) -> list[float]:
        """Train on each batch, and return the seconds of each step."""
        seconds = []
        for batch in self.batches:
            start = time.perf_counter()
            kept = self.trainer.selector.select(self.model, batch)
            self.trainer.training_step(self.model, kept)
            self.trainer.optimizer.step()
            self.trainer.optimizer.zero_grad()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    rows = lengthen(make_scenes(options.batch * options.steps, image_size=64))
    with tempfile.TemporaryDirectory() as folder:
        ways = {name: Steps(settings, rows, options, folder) for name, settings in WAYS.items()}
        first, seconds, graphs = {}, {name: [] for name in ways}, {}
        for name, steps in ways.items():
            torch._dynamo.utils.counters.clear()
            first[name] = sum(steps.run())
            graphs[name] = torch._dynamo.utils.counters["stats"].get("unique_graphs", 0)
            print(f"{name:22} first pass {first[name]:.1f} s, {graphs[name]} graphs", flush=True)
        names = list(ways)
        for number in range(options.rounds):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                seconds[name].append(statistics.median(ways[name].run()))
                print(f"round {number + 1}  {name:22} {seconds[name][-1] * 1000:.1f} ms a step", flush=True)
    results = {
        **{name: getattr(options, name) for name in ("batch", "steps", "threads", "backend")},
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "lengths": {
            name: sorted({batch["input_ids"].shape[1] for batch in steps.batches}) for name, steps in ways.items()
        },
    }
    for name, values in seconds.items():
        ratios = [own / plain for own, plain in zip(values, seconds["eager"], strict=True)]
        results[name] = {
            "graphs": graphs[name],
            "first_pass_s": first[name],
            "ms_per_step_median": statistics.median(values) * 1000,
            "ratio_to_eager_median": statistics.median(ratios),
            "ratio_to_eager_min": min(ratios),
            "ratio_to_eager_max": max(ratios),
        }
    show_and_write(results, options.output)


if __name__ == "__main__":
    main()
