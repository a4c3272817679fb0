"""How well `hf-dissect audit --fit` finds mismatched pairs, estimates their share, and keeps its promise of an FDR.

Needs a folder with a table of images and captions, stored features of the images, and permutations of the captions
(`caption_order_<noise>.npy`), which say which pairs are mismatched. Figures are means and standard deviations over the
seeds.
"""

import argparse
import logging
import tempfile
import time
from pathlib import Path

import numpy as np
from results_file import show_and_write

from hf_dissect.auditing.cross_fit import FitSettings
from hf_dissect.auditing.two_groups import find_largest_set
from hf_dissect.recipe.recipe import DataSection
from hf_dissect.runs.audit_fit import audit_by_fit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of the table")
    parser.add_argument("--features", default="mobilenet_v1_features.npz", help="file of features in that folder")
    parser.add_argument("--noise", nargs="+", default=["noise20", "noise40", "noise60", "neighbours40"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folds", type=int, default=2)
    parser.add_argument("--models", type=int, default=FitSettings.models, help="models a fold")
    parser.add_argument("--epochs", type=int, default=FitSettings.epochs)
    parser.add_argument("--max-fdr", type=float, default=0.05)
    parser.add_argument("--output", type=Path, help="also write the results to this file")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    results: dict[str, dict[str, dict[str, float]]] = {}
    for noise in options.noise:
        found: dict[str, list[float]] = {}
        for seed in options.seeds:
            for figure, value in _measure(options, noise, seed).items():
                found.setdefault(figure, []).append(value)
        results[noise] = {figure: _spread(values) for figure, values in found.items()}
        show_and_write(results, options.output)


def _measure(options: argparse.Namespace, noise: str, seed: int) -> dict[str, float]:
    data = DataSection(
        source="folder",
        path=options.data,
        image_features=options.features,
        noise_permutation=f"caption_order_{noise}.npy",
    )
    settings = FitSettings(models=options.models, epochs=options.epochs)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = audit_by_fit(
            data, folds=options.folds, seed=seed, settings=settings, output_dir=f"{folder}/audit", max_page_pairs=1
        )
    minutes = (time.perf_counter() - start) / 60
    mismatched = ~np.array(result.table["is_clean"].to_pylist())
    score, local_fdr = (result.table[name].to_numpy() for name in ("score", "local_fdr"))
    kept = find_largest_set(local_fdr, score, options.max_fdr)
    low, high = result.interval or (0.0, 1.0)
    return {
        "mismatched": float(mismatched.mean()),
        "auroc": result.auroc or 0.0,
        "separation_estimated": result.separation or 0.0,
        "share_estimated": result.mismatched_share or 0.0,
        "interval_low": low,
        "interval_high": high,
        "kept": float(kept.mean()),
        "fdr_measured": float(mismatched[kept].mean()) if kept.any() else 0.0,
        "minutes": minutes,
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "mean": round(float(np.mean(values)), 4),
        "std": round(float(np.std(values, ddof=min(1, len(values) - 1))), 4),
    }


if __name__ == "__main__":
    main()
