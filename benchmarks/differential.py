"""When does DISSect's differential tell clean from mismatched pairs? AUROC for every warm-up and every later epoch.

    hf-dissect train flickr8k-features data.path=DATA selection.strategy=none selection.record=true
    python benchmarks/differential.py runs/flickr8k-features [--output FILE.json]

Needs a finished run with `selection.record: true` whose data know the truth (noise injection). Row W: the AUROC of
`correlation after W epochs of warm-up - correlation in epoch t`, for each later epoch t; the last line is the AUROC of
the correlation alone. 0.5 is chance, and below 0.5 the rule prefers mismatched pairs.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from hf_dissect import Recipe
from hf_dissect.evaluation import noise_detection_metrics
from hf_dissect.runs.run import load_data


def truth_of(run: Path) -> np.ndarray:
    """Whether each training pair is clean, bool `(pairs,)`, in the order of the sample ids."""
    clean = load_data(Recipe.load(run / "recipe.yaml"))["train"]["clean"]
    return np.array([part for row in clean for part in (row if isinstance(row, list) else [row])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()

    clean = truth_of(options.run)
    rows = pq.read_table(options.run / "selection.parquet").to_pandas()
    epochs = sorted(rows.epoch.unique())
    correlation = np.full((len(epochs), len(clean)), np.nan)
    for epoch, part in rows.groupby("epoch"):
        correlation[epoch, part.sample_id] = part.correlation

    def auroc(scores: np.ndarray) -> float:
        return noise_detection_metrics(scores, clean)["auroc"]

    differential = {
        int(epoch) + 1: {int(t): auroc(correlation[epoch] - correlation[t]) for t in epochs if t > epoch}
        for epoch in epochs[:-1]
    }
    alone = {int(t): auroc(correlation[t]) for t in epochs}
    means = {int(t): [float(np.nanmean(correlation[t, truth])) for truth in (clean, ~clean)] for t in epochs}
    print("W  \\ t " + " ".join(f"{t:5d}" for t in epochs))
    for warmup, row in differential.items():
        print(f"{warmup:6d} " + " ".join(f"{row[t]:5.2f}" if t in row else "     " for t in map(int, epochs)))
    print("alone  " + " ".join(f"{alone[int(t)]:5.2f}" for t in epochs))
    for place, name in enumerate(("clean", "mism.")):
        print(f"{name}  " + " ".join(f"{means[int(t)][place]:5.1f}" for t in epochs))
    if options.output:
        result = {"differential": differential, "correlation": alone, "mean_clean_and_mismatched": means}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
