"""What share of a training step with selection is the training itself, with every candidate scored and ledger-first?

    python benchmarks/selection_efficiency.py --data flickr8k [--output benchmarks/results/selection_efficiency.json]

The folder of the data holds train.parquet and mobilenet_v1_features.npz of Flickr8k. In one process, four trainings of
the same small dual encoder take turns, step by step: one that loads and trains only as many pairs as the others keep,
one with selection that scores every candidate, and two that are ledger-first. `efficiency` is the time of a step of
the first over that of a step of the other, all of it: reading, decoding, tokenising, scoring, training, the ledger. In
the `steady` state the two epochs are left out in which ledger-first selection scores everything, too; `whole` has all
epochs. `forwards` is the same in forward passes of a pair (scored 1, trained 3). `loading` is the time to load a batch
over that of loading all candidates, next to `loaded`, the share of candidates that were loaded.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from results_file import show_and_write
from step_overhead import CONFIG
from torch.utils.data import DataLoader, RandomSampler

from hf_dissect import OnlineSelector, Recipe, SelectionCollator, forward_inputs, load_model_and_processor
from hf_dissect.data import as_pairs
from hf_dissect.losses import ContrastiveLoss
from hf_dissect.models.loading import logit_scale_and_bias
from hf_dissect.selection.planned_loading import BlockCollator, load_by_plan

SCORED_EPOCHS = 2
SIZES = {"photographs": (768, 128), "features": (6000, 500)}
"""Number of pairs, and of candidates in a step."""


class Arm:
    """One training of which a step can be made at a time.

    Args:
        pairs: Training pairs.
        config: Configuration of the model.
        batch: Number of candidates.
        ratio: Selection ratio.
        rescore_every: See `OnlineSelector`; None to load and train the kept pairs only.
        strategy: Name of the strategy.
    """

    def __init__(
        self, pairs: Any, config: dict, batch: int, ratio: float, rescore_every: int | None, strategy: str
    ) -> None:
        torch.manual_seed(0)
        captions = [caption for caption, _ in zip(pairs.captions(), range(5000), strict=False)]
        self.model, processor = load_model_and_processor(config=config, captions=captions)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.loss = ContrastiveLoss()
        self.selects = rescore_every is not None
        self.selector = OnlineSelector(strategy, ratio, num_samples=len(pairs), rescore_every=rescore_every or 1)
        size = batch if self.selects else round(ratio * batch)
        generator = torch.Generator().manual_seed(1)
        steps = len(pairs) // batch
        self.loader = DataLoader(
            load_by_plan(self.selector.plan, pairs, self.selector.ledger),
            batch_size=size,
            sampler=RandomSampler(pairs, num_samples=steps * size, generator=generator),
            collate_fn=BlockCollator(SelectionCollator(processor)),
        )
        self.seconds: list[list[tuple[float, float]]] = []
        self.shares: list[dict[str, float]] = []

    def run_epoch(self, epoch: int) -> Iterator[None]:
        """Make the steps of an epoch, one each time that the iterator is advanced."""
        self.selector.begin_epoch(epoch)
        self.seconds.append([])
        batches = iter(self.loader)
        for _ in range(len(self.loader)):
            start = time.perf_counter()
            batch = next(batches)
            loaded = time.perf_counter()
            self._train(batch)
            self.seconds[-1].append((time.perf_counter() - start, loaded - start))
            yield
        self.shares.append(self.selector.pop_logs())

    def _train(self, batch: dict[str, torch.Tensor]) -> None:
        if self.selects:
            batch = self.selector.select(self.model, batch)
        outputs = self.model(**forward_inputs(self.model, batch))
        weights = batch.get("reweigh", batch.get("pair_weight"))
        scale, bias = logit_scale_and_bias(self.model)
        self.loss(outputs, scale=scale, bias=bias, weights=weights).backward()
        if self.selects:
            self.selector.record_training(batch["sample_id"], outputs)
            self.selector.finish_step(self.model)
        self.optimizer.step()
        self.optimizer.zero_grad()


def measure(pairs: Any, config: dict, ratio: float, batch: int, options: Any) -> dict[str, Any]:
    """Train in turns, and return the figures of each way to select."""
    ways = {"kept only": None, "every candidate scored": 1, **{f"m = {m}": m for m in options.m}}
    arms = {name: Arm(pairs, config, batch, ratio, m, options.strategy) for name, m in ways.items()}
    for epoch in range(options.epochs):
        for _ in zip(*(arm.run_epoch(epoch) for arm in arms.values()), strict=True):
            pass
        for arm in arms.values():
            arm.shares.extend([arm.selector.pop_logs()] if len(arm.shares) <= epoch else [])
        spent = ", ".join(f"{name} {sum(s for s, _ in arm.seconds[-1]):.1f} s" for name, arm in arms.items())
        print(f"r = {ratio}, epoch {epoch + 1}: {spent}", flush=True)
    return {
        name: summarise(arm, arms["kept only"], arms["every candidate scored"], ratio, options.epochs)
        for name, arm in arms.items()
        if arm.selects
    }


def summarise(arm: Arm, kept: Arm, naive: Arm, ratio: float, epochs: int) -> dict[str, Any]:
    """Return the figures of one training with selection."""
    parts = {"steady": range(min(SCORED_EPOCHS, epochs - 1), epochs), "whole": range(epochs)}
    figures: dict[str, Any] = {}
    for part, which in parts.items():
        total, loading = (
            {
                name: sum(step[column] for epoch in which for step in one.seconds[epoch])
                for name, one in (("arm", arm), ("kept", kept), ("naive", naive))
            }
            for column in (0, 1)
        )
        shares = [arm.shares[epoch] for epoch in which]
        scored = float(np.mean([share.get("selection_scored_share", 1.0) for share in shares]))
        figures[part] = {
            "efficiency": total["kept"] / total["arm"],
            "efficiency_without_loading": (total["kept"] - loading["kept"]) / (total["arm"] - loading["arm"]),
            "forwards": 3 * ratio / (3 * ratio + scored),
            "loaded": float(np.mean([share.get("selection_loaded_share", 1.0) for share in shares])),
            "scored": scored,
            "loading": loading["arm"] / loading["naive"],
            "ms_per_step": 1000 * total["arm"] / sum(len(arm.seconds[epoch]) for epoch in which),
        }
    return figures


def load_pairs(folder: Path, kind: str, count: int) -> Any:
    """Load the first photographs with one caption each, or their stored features."""
    rows = datasets.Dataset.from_parquet(str(folder / "train.parquet")).select(range(count))
    captions = [captions[0] for captions in rows["captions"]]
    if kind == "photographs":
        return as_pairs(rows.select_columns(["image"]).add_column("caption", captions))
    stored = np.load(folder / "mobilenet_v1_features.npz")["train"][:count].astype(np.float32)
    return as_pairs(datasets.Dataset.from_dict({"image_features": list(stored), "caption": captions}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of Flickr8k")
    parser.add_argument("--kinds", default="photographs,features")
    parser.add_argument("--ratios", default="0.5,0.2")
    parser.add_argument("--m", type=lambda text: list(map(int, text.split(","))), default=[2, 8])
    parser.add_argument("--strategy", default="noisy_channel")
    parser.add_argument("--pairs", type=int, help=f"photographs {SIZES['photographs'][0]}, features more")
    parser.add_argument("--batch", type=int, help=f"photographs {SIZES['photographs'][1]}, features more")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    results: dict[str, Any] = {name: getattr(options, name) for name in ("strategy", "epochs", "threads")}
    results["torch"] = torch.__version__
    for kind in options.kinds.split(","):
        config = CONFIG if kind == "photographs" else Recipe.load("flickr8k-features").model.config
        count, batch = options.pairs or SIZES[kind][0], options.batch or SIZES[kind][1]
        pairs = load_pairs(options.data, kind, count)
        results[kind] = {"pairs": count, "batch": batch} | {
            ratio: measure(pairs, config, float(ratio), batch, options) for ratio in options.ratios.split(",")
        }
    show_and_write(results, options.output)


if __name__ == "__main__":
    main()
