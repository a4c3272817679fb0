"""Does it pay to score on smaller pictures or on fewer patches, and must the model train on such pictures, too?

    python benchmarks/cheap_scoring.py [--seeds 0,1,2] [--split test] [--output benchmarks/results/cheap_scoring.json]

The scenes of the quickstart at 64 pixels, in patches of 8, with 40 % shuffled captions; `small_loss` keeps half of 128
candidates. For one seed, all ways share pairs, batches, initial weights and schedule. `agreement` is the share of the
kept pairs that scoring on whole pictures would keep, too, at the same weights, over every eighth step of the last
three quarters (half of them agree by chance). `seconds` is the processor time of training without these comparisons,
`step` that of a step over that of a step with scoring on whole pictures in the same seed. `recall` is the sum of
recall at 1, 5 and 10 in both directions at full size. Runs that the output has are not repeated.
`decoding` is the number of
photographs of 640 x 480 pixels, drawn here as JPEG, that a collator prepares in a second at 224 and at 112 pixels.
"""

import argparse
import io
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from results_file import show_and_write

from hf_dissect import Recipe, SelectionCollator, load_model_and_processor
from hf_dissect.evaluation import format_results_table, summarise_seeds
from hf_dissect.runs.run import build_trainer, load_data
from hf_dissect.selection.cheap_scoring import CheapScoring

SIDE, SMALL = 64, 32
TOWER = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
LARGE = {
    "model_type": "clip",
    "projection_dim": 32,
    "vision_config": {**TOWER, "image_size": 224, "patch_size": 16},
    "text_config": {**TOWER, "max_position_embeddings": 16},
}
SETTINGS = [
    f"data.scenes_image_size={SIDE}",
    f"model.config.vision_config.image_size={SIDE}",
    "model.config.vision_config.hidden_size=64",
    "selection.strategy=small_loss",
    "selection.options={}",
    "training.num_train_epochs=20",
    "training.eval_strategy=no",
    "training.logging_steps=100",
    "training.report_to=none",
    "training.disable_tqdm=true",
    "training.use_cpu=true",
]
SIZE, PATCHES, TRAINED = (
    f"selection.scoring_image_size={SMALL}",
    "selection.scoring_patch_dropout=0.5",
    "model.patch_dropout=0.5",
)
ALL = "selection.strategy=none"
SCHEDULE = f"data.image_size={{0: {SMALL}, 0.8: {SIDE}}}"
WAYS: dict[str, list[str]] = {
    "all pairs": [ALL],
    "all pairs, trained without half of the patches": [ALL, TRAINED],
    "all pairs, 4/5 of the steps at half size": [ALL, SCHEDULE],
    "whole pictures": [],
    "half size, never trained on": [SIZE, "selection.scoring_exposure=0"],
    "half size, 1/8 of the steps": [SIZE, "selection.scoring_exposure=0.125"],
    "half size, 1/4 of the steps": [SIZE, "selection.scoring_exposure=0.25"],
    "half of the patches": [PATCHES],
    "half of the patches, trained without half": [PATCHES, TRAINED],
    "whole pictures, trained without half of the patches": [TRAINED],
}
FULL = "whole pictures"
COLUMNS = {"way": "way", "agreement": "agreement", "step": "time of a step", "recall": "recall sum"}


class Comparison:
    """Comparison of the choices of a run with those by scoring on whole pictures.

    Args:
        selector: Selector of the run, whose `select` is watched.
        every: Number of steps between two comparisons.
        first: First step that is compared.
    """

    def __init__(self, selector, every: int, first: int):
        self._selector, self._select, self._every, self._first = selector, selector.select, every, first
        self.shares: list[float] = []
        self.seconds = 0.0
        selector.select = self.select

    def select(self, model, batch, *, step, micro_step=0):
        if step >= self._first and step % self._every == 0 and self._selector.scores_candidates:
            start = time.process_time()
            self.shares.append(self._compare(model, batch))
            self.seconds += time.process_time() - start
        return self._select(model, batch, step=step, micro_step=micro_step)

    def _compare(self, model, batch) -> float:
        selector, own = self._selector, self._selector.cheap_scoring
        count, kept = round(selector.ratio * len(batch["sample_id"])), []
        for scoring in (own, CheapScoring()):
            selector.cheap_scoring = scoring
            scores = selector.score(model, batch, batch["sample_id"])
            kept.append(set(scores.loss.argsort()[:count].tolist()))
        selector.cheap_scoring = own
        return len(kept[0] & kept[1]) / count


def run(way: str, seed: int, options: argparse.Namespace) -> dict:
    """Train one way, and return its figures."""
    with tempfile.TemporaryDirectory() as folder:
        own = [f"training.seed={seed}", f"training.output_dir={folder}"]
        recipe = Recipe.load("quickstart").with_overrides([*SETTINGS, *own, *options.set, *WAYS[way]])
        splits = load_data(recipe)
        trainer = build_trainer(recipe, splits)
        steps = int(len(splits["train"]) // trainer.args.train_batch_size * trainer.args.num_train_epochs)
        comparison = Comparison(trainer.selector, 8, steps // 4)
        start = time.process_time()
        trainer.train()
        seconds = time.process_time() - start - comparison.seconds
        figures = trainer.evaluate(splits[options.split], metric_key_prefix="found")
    shares = comparison.shares
    found = {"seconds": seconds, "recall": figures["found_recall_sum"], "steps": steps}
    return {"way": way, "seed": seed, **found, **({"agreement": sum(shares) / len(shares)} if shares else {})}


def measure_decoding(count: int, rounds: int = 5) -> dict[str, float]:
    """Prepare pictures of both sizes in turns, and return the fastest number a second of each."""
    captions = ["a photograph"] * count
    _, processor = load_model_and_processor(config=LARGE, captions=captions)
    collator, generator = SelectionCollator(processor), np.random.default_rng(0)
    rows = []
    for number in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (30, 40, 3), dtype=np.uint8))
        content = io.BytesIO()
        coarse.resize((640, 480), Image.Resampling.BICUBIC).save(content, "JPEG", quality=90)
        image = {"bytes": content.getvalue(), "path": None}
        rows.append({"image": image, "caption": captions[number], "sample_id": number})
    seconds: dict[int, float] = {}
    for _ in range(rounds):
        for side in (224, 112):
            with collator.at_size(side):
                start = time.process_time()
                collator(rows)
                spent = time.process_time() - start
            seconds[side] = min(spent, seconds.get(side, spent))
    return {str(side): count / spent for side, spent in seconds.items()}


def summarise(runs: list[dict]) -> list[dict]:
    """A row for each way, with mean and spread over the seeds."""
    full = {run["seed"]: run["seconds"] / run["steps"] for run in runs if run["way"] == FULL}
    rows = []
    for way in WAYS:
        own = [run for run in runs if run["way"] == way]
        figures = [
            {name: run[name] for name in ("agreement", "recall") if name in run}
            | ({"step": run["seconds"] / run["steps"] / full[run["seed"]]} if run["seed"] in full else {})
            for run in own
        ]
        rows += [{**summarise_seeds(figures), "way": way, "runs": len(own)}] if own else []
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--split", default="test", choices=("validation", "test"))
    parser.add_argument("--ways", help="numbers of the ways, as in 0,3; all of them without")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="further settings")
    parser.add_argument("--photographs", type=int, default=64, help="photographs that are decoded")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    names = list(WAYS)
    chosen = names if options.ways is None else [names[int(number)] for number in options.ways.split(",")]
    known = json.loads(options.output.read_text())["runs"] if options.output and options.output.exists() else []
    done = {(run["way"], run["seed"]) for run in known}
    for seed in map(int, options.seeds.split(",")):
        for way in chosen:
            if (way, seed) in done:
                continue
            known.append(run(way, seed, options))
            print(known[-1], flush=True)
            if options.output:  # so that a run that is stopped can continue
                options.output.parent.mkdir(parents=True, exist_ok=True)
                options.output.write_text(json.dumps({"runs": known}) + "\n")
    rows = summarise(known)
    results = {"split": options.split, "settings": [*SETTINGS, *options.set], "rows": rows, "runs": known}
    results["decoding"] = measure_decoding(options.photographs)
    show_and_write(results, options.output)
    print(format_results_table(rows, COLUMNS, {"agreement": 2, "step": 2, "recall": 1}))


if __name__ == "__main__":
    main()
