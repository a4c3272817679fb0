"""Which score finds the mismatched pairs of data that a model has not seen, and which estimate of their number holds.

A small CLIP is trained on drawn scenes with 40 % wrong captions as in the quickstart, by `small_loss`. New scenes with
other shares of wrong captions are then audited. Figures are means and standard deviations over the seeds.
"""

import argparse
import logging
import tempfile
from pathlib import Path

import numpy as np
import torch
from results_file import show_and_write

from hf_dissect.auditing.embeddings import PairEmbeddings, join_embeddings
from hf_dissect.auditing.scores import score_matches
from hf_dissect.auditing.two_groups import fit_two_groups
from hf_dissect.data import make_scenes, shuffle_captions
from hf_dissect.evaluation import noise_detection_metrics
from hf_dissect.models.loading import load_model_and_processor, logit_scale_and_bias
from hf_dissect.recipe.recipe import Recipe
from hf_dissect.runs.evaluate import make_evaluating_trainer
from hf_dissect.runs.output_folder import replace_output_dir
from hf_dissect.runs.run import run_recipe
from hf_dissect.selection.soft_labels import compute_upper_posterior

RATES = (0.0, 0.05, 0.1, 0.4, 0.7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of the training")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=1024, help="pairs that are audited")
    parser.add_argument("--output", type=Path, help="also write the results to this file")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    found: dict[str, dict[str, list[float]]] = {}
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as folder:
            run_recipe(replace_output_dir(_recipe(seed, options.overrides), folder))
            for name, rows in _data_sets(options.pairs, seed).items():
                for figure, value in _figures(*_embedded(folder, rows)).items():
                    found.setdefault(name, {}).setdefault(figure, []).append(value)
    show_and_write(
        {name: {figure: _spread(values) for figure, values in of.items()} for name, of in found.items()},
        options.output,
    )


def _recipe(seed: int, overrides: list[str]) -> Recipe:
    settings = ["selection.strategy=small_loss", "selection.options={}", "evaluation.zero_shot=null"]
    settings += [f"{key}={seed}" for key in ("training.seed", "data.noise_seed", "data.scenes_seed")]
    return Recipe.load("quickstart", [*settings, "training.disable_tqdm=true", *overrides])


def _data_sets(count: int, seed: int) -> dict:
    scenes = make_scenes(count, seed=100 + seed, split="test")
    return {f"{rate:.0%} mismatched": shuffle_captions(scenes, rate=rate, seed=seed) for rate in RATES}


def _embedded(folder: str, rows) -> tuple[PairEmbeddings, float]:
    model, processor = load_model_and_processor(name_or_path=folder)
    scale, _ = logit_scale_and_bias(model)
    with make_evaluating_trainer(
        folder, model, processor, rows, Recipe.load(f"{folder}/recipe.yaml").data, 256, 0
    ) as trainer:
        scored = trainer.score_batches(trainer.get_eval_dataloader())
        return join_embeddings(scored, trainer.accelerator.gather_for_metrics), torch.as_tensor(scale).item()


def _figures(found: PairEmbeddings, scale: float) -> dict[str, float]:
    keys = {"image_key": found.image_key, "caption_key": found.caption_key}
    matches = score_matches(found.image, found.text, logit_scale=scale, **keys)
    mismatched = ~found.is_clean.numpy()
    values = matches.score.numpy()
    without_outliers = values.clip(*np.quantile(values, (0.01, 0.99)))
    groups = fit_two_groups(matches)
    probability = {
        "strangers": groups.p_mismatched,
        "gaussian_mixture": 1 - compute_upper_posterior(without_outliers),
    }
    figures = {
        "share_by_strangers": groups.share,
        "separation": groups.separation,
        "share_by_gaussian_mixture": float(probability["gaussian_mixture"].mean()),
    }
    if mismatched.any():
        cosine = (found.image * found.text).sum(1)
        for name, score in {"cosine": cosine, "z_score": _z_score(found), "score": matches.score}.items():
            figures[f"auroc_{name}"] = noise_detection_metrics(score, found.is_clean)["auroc"]
        for name, values in probability.items():
            flagged = values > 0.5
            figures[f"precision_{name}"] = float(mismatched[flagged].mean()) if flagged.any() else float("nan")
            figures[f"recall_{name}"] = float(flagged[mismatched].mean())
    return figures


def _z_score(found: PairEmbeddings) -> torch.Tensor:
    """Deviations of the cosine from the mean of its image's and its caption's cosines with other pairs."""
    cosine = found.image @ found.text.T
    own = cosine.diagonal()
    sides = [(own - side.mean(1)) / side.std(1) for side in (cosine, cosine.T)]
    return (sides[0] + sides[1]) / 2


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "mean": round(float(np.mean(values)), 4),
        "std": round(float(np.std(values, ddof=min(1, len(values) - 1))), 4),
    }


if __name__ == "__main__":
    main()
