"""`hf-dissect evaluate`: the figures of a saved model, be it a dual encoder or the student of a distillation."""

import argparse
import json
import os
from pathlib import Path

from hf_dissect.cli.process import (
    add_command,
    add_pair_columns,
    is_first_process,
    not_negative,
    positive,
    quiet_libraries,
)

SUMMARY = "Retrieval and zero-shot figures of a saved model; accuracy and R@1 of a distilled student."
EPILOG = """examples:
  hf-dissect evaluate runs/quickstart                the data of the run's own recipe
  hf-dissect evaluate runs/x --data /data/flickr8k --split test
  hf-dissect evaluate hub:ada/mine                   a published run, on the data of its recipe
  hf-dissect evaluate openai/clip-vit-base-patch32 --data /data/pets --classes cat,dog --label-column species
  hf-dissect evaluate runs/student --data /data/birds --split validation"""
FIGURES = {
    "recall_sum": "recall sum",
    "zero_shot_accuracy@1": "zero-shot top-1 accuracy",
    "zero_shot_accuracy@5": "zero-shot top-5 accuracy",
    "noise_detection_auroc": "noise detection AUROC",
    "noise_detection_average_precision": "noise detection average precision",
}
_OF_DUAL_ENCODERS = ("caption_column", "task_column", "classes", "template", "image_features")


def add_parser(subparsers) -> None:
    """Add the command to those of `hf-dissect`."""
    part = add_command(subparsers, "evaluate", _evaluate, SUMMARY, EPILOG)
    part.add_argument("checkpoint", help="run folder, checkpoint folder, Hub id or hub:USER/REPO")
    part.add_argument(
        "--data", help="folder, file, .tar shards, .npz of a student, Hub data set id or scenes (default: the run's)"
    )
    part.add_argument("--split", default="test", help="split of the data (default: test)")
    add_pair_columns(part, "column of the images, or of whatever a student reads")
    part.add_argument("--label-column", help="column of the labels (default: label, or that of a student's recipe)")
    part.add_argument("--classes", help="class names: comma-separated, or a file with one a line")
    part.add_argument("--template", action="append", help="caption of a class, {} is its name; may be repeated")
    part.add_argument("--max-rows", type=positive, help="evaluate the first rows only")
    part.add_argument("--batch-size", type=positive, default=64, help="pairs or rows a forward pass (default: 64)")
    part.add_argument("--num-workers", type=not_negative, default=0, help="processes that decode (default: 0)")
    part.add_argument("--output", help="also write the figures to this JSON file")


def _evaluate(options: argparse.Namespace) -> None:
    quiet_libraries()
    from hf_dissect.distillation.saved_student import is_student

    figures, table = (_of_student if is_student(options.checkpoint) else _of_dual_encoder)(options)
    if not is_first_process():
        return
    print(table)
    if options.output:
        Path(options.output).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _of_dual_encoder(options: argparse.Namespace) -> tuple[dict[str, float], str]:
    from hf_dissect.runs.evaluate import DEFAULT_TEMPLATES, evaluate_checkpoint

    figures = evaluate_checkpoint(
        options.checkpoint,
        data=options.data,
        split=options.split,
        image_column=options.image_column,
        caption_column=options.caption_column,
        task_column=options.task_column,
        label_column=options.label_column or "label",
        classes=_names(options.classes),
        templates=options.template or DEFAULT_TEMPLATES,
        image_features=options.image_features,
        max_rows=options.max_rows,
        batch_size=options.batch_size,
        num_workers=options.num_workers,
    )
    return figures, retrieval_table(figures)


def _of_student(options: argparse.Namespace) -> tuple[dict[str, float], str]:
    if given := [name for name in _OF_DUAL_ENCODERS if getattr(options, name) is not None]:
        named = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(
            f"{options.checkpoint} is the student of a distillation, which classifies what it reads in one column: "
            f"{named} say nothing to it; leave them out."
        )
    from hf_dissect.distillation.summary import figures_table
    from hf_dissect.runs.evaluate_student import evaluate_student

    figures = evaluate_student(
        options.checkpoint,
        data=options.data,
        split=options.split,
        column=options.image_column,
        label_column=options.label_column,
        max_rows=options.max_rows,
        batch_size=options.batch_size,
        num_workers=options.num_workers,
    )
    return figures, figures_table(figures)


def retrieval_table(figures: dict[str, float]) -> str:
    """Recalls in per cent, and below them accuracies and the like, as text."""
    from hf_dissect.evaluation import format_results_table

    rows = []
    for name, direction in (("image to text", "image_to_text"), ("text to image", "text_to_image")):
        keys = {f"R@{k}": f"{direction}_R@{k}" for k in (1, 5, 10)} | {"median rank": f"{direction}_median_rank"}
        if f"{direction}_R@1" in figures:
            rows.append({"retrieval": name, **{heading: figures[key] for heading, key in keys.items()}})
    parts = [format_results_table(rows, list(rows[0]), decimals=1)] if rows else []
    known = {name: figures[key] for key, name in FIGURES.items() if figures.get(key) is not None}
    if known:
        width = max(map(len, known))
        parts.append("\n".join(f"{name:{width}}  {value:.4g}" for name, value in known.items()))
    return "\n\n".join(parts) or "Nothing was evaluated: there is no validation or test split."


def _names(text: str | None) -> list[str] | None:
    """Class names from a comma-separated list or a file with one a line."""
    if text is None:
        return None
    if os.path.isfile(text):  # unlike Path.is_file no error for a list longer than a file name may be
        return [line.strip() for line in Path(text).read_text(encoding="utf-8").splitlines() if line.strip()]
    return [name.strip() for name in text.split(",") if name.strip()]
