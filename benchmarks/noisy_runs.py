"""One run of `noisy_correspondence.py` or `time_to_quality.py`: the data, the trainer, and what is measured of it."""

import argparse
import dataclasses
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import transformers
from noisy_methods import (
    BY_REFERENCE,
    METHODS,
    OPINIONS,
    SETTINGS,
    Oracle,
    noise_settings,
    order_file,
    split_condition,
)
from torch.optim.swa_utils import AveragedModel
from transformers import PrinterCallback, TrainerCallback

from hf_dissect import DissectTrainer, Recipe, SelectionCollator, load_splits
from hf_dissect.data import as_pairs
from hf_dissect.evaluation import noise_detection_metrics
from hf_dissect.evaluation.pair_scores import join_correlations
from hf_dissect.evaluation.selection_figures import compute_label_figures, read_soft_labels
from hf_dissect.runs.run import build_trainer
from hf_dissect.selection import SampleLedger

AVERAGED_SHARE = 0.75
TIMED_BATCHES = 4  # in an epoch of a run that only measures the time of a step
FEATURES = "mobilenet_v1_features.npz"
TOWERS = (
    "model={vision: {features: true}, text: {features: true}, projection_dim: 256}",
    "data.image_features=efficientnet_lite0_features.npz",
)
CAPTIONS = 5  # of an image
TARGETS = 1000  # wrong captions whose targets are measured


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


class MeanWeights(TrainerCallback):
    """Keeps the mean of the weights over the last share of the steps."""

    def __init__(self, share: float = AVERAGED_SHARE):
        self._share = share
        self._mean: AveragedModel | None = None

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step > (1 - self._share) * state.max_steps:
            self._mean = AveragedModel(model) if self._mean is None else self._mean
            self._mean.update_parameters(model)

    @contextmanager
    def used_by(self, model: torch.nn.Module) -> Iterator[None]:
        """Put the mean into the model for the time of the block."""
        own = [weight.detach().clone() for weight in model.parameters()]
        with torch.no_grad():
            for weight, mean in zip(model.parameters(), self._mean.module.parameters(), strict=True):
                weight.copy_(mean)
            yield
            for weight, kept in zip(model.parameters(), own, strict=True):
                weight.copy_(kept)


def list_shared_settings(options: argparse.Namespace) -> list[str]:
    """The settings of all runs."""
    pictures, towers = getattr(options, "pictures", False), getattr(options, "towers", None)
    left_out = ("model.config.text_config",) if pictures or towers else ()
    left_out += ("model.max_caption",) if towers else ()
    shared = [setting for setting in SETTINGS if not setting.startswith(left_out)]
    return [*shared, *TOWERS, f"data.text_features={towers}"] if towers else shared


def load_recipe(method: str, options: argparse.Namespace, *given: str) -> Recipe:
    """The recipe of a method, with the settings of all runs after its own, and those of one run last."""
    pictures = getattr(options, "pictures", False)
    shared = list_shared_settings(options)
    own = {**METHODS, **getattr(options, "own_methods", {})}[method]
    if method in BY_REFERENCE and getattr(options, "reference", None):
        own = [*own, f"selection.reference={options.reference}", f"model.tokenizer={options.reference}"]
    base = "flickr8k-local" if pictures else "flickr8k-features"
    return Recipe.load(base, [*shared, *own, *options.set, *given])


def prepare(
    method: str, condition: str, seed: int, options: argparse.Namespace, folder: str, *given: str, parts: tuple = ()
) -> DissectTrainer:
    """The trainer of a method, which evaluates the splits `parts` under their names.

    `options` has `data` (folder), `set` (settings of all runs) and, of `time_to_quality.py`, `pictures` and
    `own_methods` (settings by name).
    """
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    pictures = getattr(options, "pictures", False)
    noise = noise_settings(condition, count_captions(options.data), folder)
    own = [f"data.path={options.data}", *noise, f"training.seed={seed}", f"training.output_dir={folder}"]
    recipe = load_recipe(method, options, *own, *given)
    splits = load_condition(recipe, condition, pictures)
    trainer = build_trainer(recipe, splits)
    trainer.args.save_run_folder = False
    trainer.remove_callback(PrinterCallback)
    collator, names = trainer.data_collator, trainer.args.column_names()
    if pictures:  # decoded in each epoch, as a run decodes them; the pairs of evaluation, too
        trainer.eval_dataset = {part: as_pairs(splits[part], **names) for part in parts}
        clean = torch.tensor([value for row in splits["train"]["clean"] for value in row])
    else:
        collator.text_padding = "max_length"
        trainer.train_dataset = Collated(trainer.train_dataset, collator)
        trainer.eval_dataset = {part: Collated(as_pairs(splits[part], **names), collator) for part in parts}
        trainer.data_collator = Collated.collate
        clean = trainer.train_dataset.columns["is_clean"]
    if method == "oracle":
        trainer.selector.strategy = Oracle(clean)
    return trainer


def load_condition(recipe: Recipe, condition: str, pictures: bool) -> dict:
    """The splits of a recipe; neighbours of photographs are found by stored features, which the model does not see."""
    given = dataclasses.asdict(recipe.data)
    if not pictures or split_condition(condition)[0] != "neighbours":
        return load_splits(**given)
    splits = load_splits(**given | {"image_features": FEATURES})
    return {split: rows.remove_columns("image_features") for split, rows in splits.items()}


def count_captions(folder: str) -> int:
    """The number of training pairs in the folder of the data."""
    captions = pq.read_table(Path(folder, "train.parquet"), columns=["captions"])["captions"]
    return int(pc.sum(pc.list_value_length(captions)).as_py())


def charged_seconds(trainer: DissectTrainer) -> float:
    """The seconds of data, scoring and training so far, without those of evaluations."""
    spent = trainer.times.measure_so_far()
    return sum(spent.get(part, 0.0) for part in ("data", "scoring", "training"))


def measure_step_ratio(method: str, condition: str, seed: int, options: argparse.Namespace) -> float:
    """The time of a step of the method over that of plain training: the median of short runs that take turns.

    It is processor time, as other programs on the machine distort seconds. The short runs have the method's epochs and
    warm-up, of a few batches each, so that every phase has its share.
    """
    seconds: dict[str, list[float]] = {"none": [], method: []}
    kind, rate = split_condition(condition)
    more = 1 + rate / 100 if kind == "absent" else 1.0  # a share of the rows is left out
    for number in range(options.timing_rounds + 1):
        for name in list(seconds)[:: 1 if number % 2 else -1]:
            with tempfile.TemporaryDirectory() as folder:
                batch = int(load_recipe("none", options).training["per_device_train_batch_size"])
                short = [
                    f"data.max_train_rows={math.ceil(more * TIMED_BATCHES * batch / 5)}",
                    "training.eval_strategy=no",
                ]
                trainer = prepare(name, condition, seed, options, folder, *short)
                start = time.process_time()
                trainer.train()
                if number:  # the first round warms up
                    seconds[name].append((time.process_time() - start) / trainer.state.global_step)
    return statistics.median(own / plain for own, plain in zip(seconds[method], seconds["none"], strict=True))


def run(method: str, condition: str, seed: int, options: argparse.Namespace) -> dict:
    """Train one model; its figures."""
    found = {"method": method, "noise": condition, "seed": seed, "budget": options.budget}
    given = []
    if options.budget == "time" and method != "none":
        found["step_ratio"] = measure_step_ratio(method, condition, seed, options)
        epochs = float(load_recipe("none", options).training["num_train_epochs"])
        given = [f"training.num_train_epochs={epochs / found['step_ratio']:.4f}"]
    parts = tuple(dict.fromkeys(("validation", options.split)))
    with tempfile.TemporaryDirectory() as folder:
        trainer = prepare(method, condition, seed, options, folder, *given, parts=parts)
        mean = MeanWeights()
        trainer.add_callback(mean)
        trainer.train()
        return found | figures(trainer, options.split, mean, find_true_images(condition, options.data))


def figures(trainer: DissectTrainer, split: str, mean: MeanWeights, true_image: torch.Tensor | None = None) -> dict:
    """What a finished run shows."""
    sums = {
        part: [logs[key] for logs in trainer.state.log_history if (key := f"eval_{part}_recall_sum") in logs]
        for part in trainer.eval_dataset
    }
    best = max(range(len(sums["validation"])), key=sums["validation"].__getitem__)
    found = {"last": sums[split][-1], "best": sums[split][best], "best_epoch": best + 1, "epochs": sums}
    seconds, steps = charged_seconds(trainer), trainer.state.global_step
    found |= {"seconds": seconds, "steps": steps, "seconds_per_step": seconds / steps}
    with mean.used_by(trainer.model):
        averaged = trainer.evaluate(metric_key_prefix="averaged")
    found |= {"averaged": averaged[f"averaged_{split}_recall_sum"]}
    found |= {"averaged_validation": averaged["averaged_validation_recall_sum"]}

    scored = join_correlations(
        trainer.score_batches(trainer.get_eval_dataloader(trainer.train_dataset)),
        trainer.accelerator.gather_for_metrics,
    )
    if scored["is_clean"].all():  # nothing to detect
        return found
    found |= compute_label_figures(trainer.ledger, scored["sample_id"], scored["is_clean"])
    found |= label_weight(trainer.ledger, scored["sample_id"], scored["is_clean"])
    if (ranking := trainer.monitor.ranking_truth()) is not None:
        found["ranking_auroc"] = noise_detection_metrics(*ranking)["auroc"]
    found["model_auroc"] = noise_detection_metrics(scored["correlation"], scored["is_clean"])["auroc"]
    if trainer.objective.repair is not None and true_image is not None:
        found |= measure_targets(trainer, true_image)
    return found | {"detection": next(found[name] for name in OPINIONS if name in found)}


def find_true_images(condition: str, folder: str) -> torch.Tensor | None:
    """The image that each caption describes, int64 `(pairs,)`; None where the order of the captions is no file."""
    order = order_file(condition)
    return None if order is None else torch.from_numpy(np.load(Path(folder, order)) // CAPTIONS).long()


@torch.no_grad()
def measure_targets(trainer: DissectTrainer, true_image: torch.Tensor) -> dict[str, float]:
    """How far a wrong caption's target over 512 images finds the true one: its share, and how often in the top 10.

    A target that knows nothing gives it a share of 1/512, and has it in the top 10 in 2 % of cases.
    """
    repair, model, pairs = trainer.objective.repair, trainer.model, trainer.train_dataset
    captions, vectors = [], []
    for batch in trainer.get_eval_dataloader(pairs):
        outputs = trainer.encoder(model, trainer._prepare_inputs(batch))
        captions.append(outputs["text_embeds"].cpu())
        vectors.append(repair.space.embed(model, batch, outputs, False).cpu())
    keys = torch.stack([pairs.columns[name] for name in ("sample_id", "image_key")])
    captions, vectors = torch.cat(captions), repair.pairs.center(torch.cat(vectors))
    generator = torch.Generator().manual_seed(0)
    (wrong,) = (~pairs.columns["is_clean"]).nonzero(as_tuple=True)
    wrong = wrong[torch.randperm(len(wrong), generator=generator)[:TARGETS]]
    shares, top = [], []
    for position in wrong.tolist():
        others = torch.randperm(len(vectors) // CAPTIONS, generator=generator)[:512]
        others = torch.cat([true_image[position : position + 1], others[others != true_image[position]][:511]])
        rows = slice(position, position + 1)
        target = repair.find_image_targets(captions[rows], keys[:, rows], vectors[others * CAPTIONS])[0].exp()
        shares.append(target[0].item())
        top.append(float((target > target[0]).sum() < 10))
    return {"target_share": statistics.fmean(shares), "target_in_top_10": statistics.fmean(top)}


def label_weight(ledger: SampleLedger, sample_id: torch.Tensor, is_clean: torch.Tensor) -> dict[str, float]:
    """Of soft labels: the median of the matched pairs', and the mismatched pairs' share of all label weight."""
    if (labels := read_soft_labels(ledger, sample_id)) is None:
        return {}
    share = labels[~is_clean].sum() / labels.sum()
    return {"label_median_matched": labels[is_clean].median().item(), "label_weight_mismatched": share.item()}
