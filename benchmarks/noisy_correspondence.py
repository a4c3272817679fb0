"""What does each remedy against mismatched pairs recover? Flickr8k with 20, 40 and 60 % of its captions exchanged.

    python benchmarks/noisy_correspondence.py --data flickr8k --output FILE.json [--workers 2]
    python benchmarks/noisy_correspondence.py --data flickr8k --methods none,gsc --noise 40 --split validation
    python benchmarks/noisy_correspondence.py --output FILE.json --table

The folder of the data holds {train,validation,test}.parquet, the image features and caption_order_noise{20,40,60}.npy.
Within one rate and seed all methods share the pairs, the batches, the initial weights, the schedule and the number of
steps; `gsc+` trains a second network beside the first. `oracle` knows the truth: mismatched pairs have no weight.

`detection` is the AUROC of a method's own opinion of the pairs (its label, its division or its ranking in the last
epoch; of the methods without any, the correlation under the final weights). `recovered` is the share of what the
oracle gains over `none`, in the recall sum of the last epoch. Of soft labels, FILE.json also has the median of the
matched pairs' and the share that mismatched pairs have of the sum of all. Runs that FILE.json has are not repeated.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import torch
import transformers
from tqdm.auto import tqdm
from transformers import PrinterCallback

from hf_dissect import DissectTrainer, Recipe, SelectionCollator
from hf_dissect.data import as_pairs
from hf_dissect.evaluation import format_results_table, noise_detection_metrics, summarise_seeds
from hf_dissect.evaluation.pair_scores import join_correlations
from hf_dissect.evaluation.selection_figures import compute_label_figures, read_soft_labels
from hf_dissect.runs.run import build_trainer, load_data
from hf_dissect.selection import CandidateScores, SampleLedger, Selection
from hf_dissect.selection.uniform import KeepAll

SETTINGS = [
    "selection.mask_false_negatives=false",  # GSC's loss knows no mask
    "model.max_caption_length=16",
    "model.config.text_config.hidden_size=64",
    "model.config.text_config.intermediate_size=128",
    "model.config.text_config.num_attention_heads=2",
    "training.num_train_epochs=8",
    "training.learning_rate=3e-3",
    "training.eval_strategy=epoch",
    "training.report_to=none",
    "training.disable_tqdm=true",
    "training.logging_steps=58",
]
ALL_PAIRS = ["selection.strategy=none"]
GSC = [*ALL_PAIRS, "objective.gsc.warmup_epochs=1"]
METHODS = {
    "none": ALL_PAIRS,
    "small_loss": ["selection.strategy=small_loss"],
    "ncr": ["selection.strategy=ncr", "selection.warmup_epochs=1"],
    "dissect": ["selection.strategy=dissect", "selection.warmup_epochs=4"],
    "gsc": GSC,
    "gsc-without-labels": [*GSC, "objective.gsc.beta=1e-9"],  # its loss and temperature alone
    "gsc+": [*GSC, "objective.gsc.dual=true"],
    "gsc+-without-labels": [*GSC, "objective.gsc.dual=true", "objective.gsc.beta=1e-9"],  # what two networks gain
    "noisy_channel": [*ALL_PAIRS, "objective.noisy_channel={}"],
    "noisy_channel-half": ["selection.strategy=noisy_channel"],
    "noisy_channel-half-m8": ["selection.strategy=noisy_channel", "selection.rescore_every=8"],
    "oracle": ALL_PAIRS,
}
OPINIONS = ("label_auroc", "p_clean_auroc", "ranking_auroc", "model_auroc")
COLUMNS = {
    "method": "method",
    "last": "recall sum, last",
    "best": "best on validation",
    "detection": "detection",
    "model_auroc": "of the model",
    "recovered": "recovered",
    "seconds": "seconds",
}
DECIMALS = {"last": 1, "best": 1, "detection": 3, "model_auroc": 3, "recovered": 2, "seconds": 0}


class Oracle(KeepAll):
    """Weights the pairs by the truth, a bool `(pairs,)` in the order of the sample ids."""

    name = "oracle"

    def __init__(self, is_clean: torch.Tensor):
        super().__init__()
        self._weights = is_clean.float()

    def select(self, scores: CandidateScores, ledger: SampleLedger, k: int) -> Selection:
        return Selection(torch.arange(scores.num_candidates), weights=self._weights[scores.sample_id])


class Collated(torch.utils.data.Dataset):
    """The positions of pairs that are collated once, so that no run tokenises them epoch after epoch."""

    def __init__(self, pairs: torch.utils.data.Dataset, collator: SelectionCollator):
        chunks = [range(first, min(first + 1000, len(pairs))) for first in range(0, len(pairs), 1000)]
        batches = [collator(pairs.__getitems__(list(chunk))) for chunk in chunks]
        self.columns = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}

    @property
    def sample_ids(self) -> list[int]:
        """Ids that a plan knows before it loads pairs."""
        return self.columns["sample_id"].tolist()

    def __len__(self) -> int:
        return len(self.columns["sample_id"])

    def __getitem__(self, position: int) -> tuple["Collated", int]:
        return self, position

    @staticmethod
    def collate(rows: list[tuple["Collated", int]]) -> dict[str, torch.Tensor]:
        positions = torch.tensor([position for _, position in rows])
        return {name: values[positions] for name, values in rows[0][0].columns.items()}


def run(method: str, noise: int, seed: int, options: argparse.Namespace) -> dict:
    """Train one model; its figures."""
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        given = [
            f"data.path={options.data}",
            f"data.noise_permutation=caption_order_noise{noise}.npy",
            f"training.seed={seed}",
            f"training.output_dir={folder}",
        ]
        recipe = Recipe.load("flickr8k-features", [*SETTINGS, *given, *METHODS[method], *options.set])
        splits = load_data(recipe)
        trainer = build_trainer(recipe, splits)
        trainer.args.save_run_folder = False
        trainer.remove_callback(PrinterCallback)
        collator, names = trainer.data_collator, trainer.args.column_names()
        collator.text_padding = "max_length"
        trainer.train_dataset = Collated(trainer.train_dataset, collator)
        trainer.eval_dataset = {
            part: Collated(as_pairs(splits[part], **names), collator)
            for part in dict.fromkeys(("validation", options.split))
        }
        trainer.data_collator = Collated.collate
        if method == "oracle":
            trainer.selector.strategy = Oracle(trainer.train_dataset.columns["is_clean"])
        trainer.train()
        return {"method": method, "noise": noise, "seed": seed, **figures(trainer, options.split)}


def figures(trainer: DissectTrainer, split: str) -> dict:
    """What a finished run shows."""
    sums = {
        part: [logs[key] for logs in trainer.state.log_history if (key := f"eval_{part}_recall_sum") in logs]
        for part in dict.fromkeys(("validation", split))
    }
    best = max(range(len(sums["validation"])), key=sums["validation"].__getitem__)
    found = {"last": sums[split][-1], "best": sums[split][best], "best_epoch": best + 1, "epochs": sums}
    seconds = sum(trainer.times[part] for part in ("data", "scoring", "training"))
    found |= {"seconds": seconds, "steps": trainer.state.global_step}

    scored = join_correlations(
        trainer.score_batches(trainer.get_eval_dataloader(trainer.train_dataset)),
        trainer.accelerator.gather_for_metrics,
    )
    found |= compute_label_figures(trainer.ledger, scored["sample_id"], scored["is_clean"])
    found |= label_weight(trainer.ledger, scored["sample_id"], scored["is_clean"])
    if (ranking := trainer.monitor.ranking_truth()) is not None:
        found["ranking_auroc"] = noise_detection_metrics(*ranking)["auroc"]
    found["model_auroc"] = noise_detection_metrics(scored["correlation"], scored["is_clean"])["auroc"]
    return found | {"detection": next(found[name] for name in OPINIONS if name in found)}


def label_weight(ledger: SampleLedger, sample_id: torch.Tensor, is_clean: torch.Tensor) -> dict[str, float]:
    """Of soft labels: the median of the matched pairs', and the mismatched pairs' share of all label weight."""
    if (labels := read_soft_labels(ledger, sample_id)) is None:
        return {}
    share = labels[~is_clean].sum() / labels.sum()
    return {"label_median_matched": labels[is_clean].median().item(), "label_weight_mismatched": share.item()}


def tables(runs: list[dict]) -> Iterator[tuple[int, list[dict]]]:
    """Rate by rate, a row per method: figures as mean and spread over the seeds."""
    for noise in sorted({run["noise"] for run in runs}):
        of_rate = [run for run in runs if run["noise"] == noise]
        by_seed = {(run["method"], run["seed"]): run for run in of_rate}
        rows = []
        for method in [name for name in METHODS if any(run["method"] == name for run in of_rate)]:
            own = [run for run in of_rate if run["method"] == method]
            ends = [[by_seed.get((end, run["seed"])) for end in ("none", "oracle")] for run in own]
            shares = [
                {"recovered": (run["last"] - none["last"]) / (oracle["last"] - none["last"])}
                if none and oracle
                else {}
                for run, (none, oracle) in zip(own, ends, strict=True)
            ]
            summary = summarise_seeds([run | share for run, share in zip(own, shares, strict=True)])
            rows.append({**summary, "method": method, "seeds": sorted(run["seed"] for run in own)})
        yield noise, rows


def show(runs: list[dict]) -> None:
    for noise, rows in tables(runs):
        print(
            f"\n{noise} % mismatched, seeds {', '.join(map(str, sorted({s for row in rows for s in row['seeds']})))}"
        )
        print(format_results_table(rows, COLUMNS, DECIMALS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of Flickr8k")
    parser.add_argument("--methods", default=",".join(METHODS), help=f"of {', '.join(METHODS)}")
    parser.add_argument("--noise", default="20,40,60", help="percentages, of 20, 40 and 60")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--split", choices=("validation", "test"), default="test", help="of the reported figures")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="setting of all runs")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--output", type=Path, help="JSON with all runs; those in it are not repeated")
    parser.add_argument("--table", action="store_true", help="only print the table of the runs in --output")
    options = parser.parse_args()

    runs = json.loads(options.output.read_text())["runs"] if options.output and options.output.exists() else []
    done = {(run["method"], run["noise"], run["seed"]) for run in runs}
    rates, seeds, methods = map(int, options.noise.split(",")), options.seeds.split(","), options.methods.split(",")
    if unknown := set(methods) - set(METHODS):
        parser.error(f"--methods: {', '.join(sorted(unknown))}: choose of {', '.join(METHODS)}")
    if not options.table and not options.data:
        parser.error("--data is missing: the folder of Flickr8k")
    rates = list(rates)
    planned = [(method, noise, int(seed)) for seed in seeds for noise in rates for method in methods]
    missing = [] if options.table else [job for job in planned if job not in done]
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
        jobs = [pool.submit(run, *job, options) for job in missing]
        for job in tqdm(as_completed(jobs), total=len(jobs), disable=not jobs):
            runs.append(job.result())
            if options.output:
                options.output.parent.mkdir(parents=True, exist_ok=True)
                options.output.write_text(json.dumps({"settings": SETTINGS, "runs": runs}, indent=1) + "\n")
    show(runs)


if __name__ == "__main__":
    main()
