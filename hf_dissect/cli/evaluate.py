"""`hf-dissect evaluate`: the figures of a saved model, be it a dual encoder or the student of a distillation."""

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from hf_dissect.cli.options import add_command, add_data_settings, add_pair_columns, parse_not_negative, parse_positive
from hf_dissect.cli.output import is_first_process, quiet_libraries

if TYPE_CHECKING:
    from hf_dissect.cli.options import Commands

SUMMARY = "Retrieval and zero-shot figures of a saved model; accuracy and R@1 of a distilled student."
EPILOG = """examples:
  hf-dissect evaluate runs/quickstart                the data of the run's own recipe
  hf-dissect evaluate runs/x --data /data/flickr8k --split test
  hf-dissect evaluate hub:ada/mine                   a published run, on the data of its recipe
  hf-dissect evaluate openai/clip-vit-base-patch32 --data /data/pets --classes cat,dog --label-column species
  hf-dissect evaluate runs/x --data /data/export.csv data.separator=';' data.encoding=cp1252
  hf-dissect evaluate runs/student --data /data/birds --split validation"""


def add_parser(commands: "Commands") -> None:
    """Add the command to `hf-dissect`."""
    parser = add_command(commands, "evaluate", _evaluate, SUMMARY, EPILOG)
    parser.add_argument("checkpoint", help="run folder, checkpoint folder, Hub id or hub:USER/REPO")
    add_data_settings(parser)
    parser.add_argument(
        "--data", help="folder, file, .tar shards, Hub data set id, scenes, or .npz of a student (default: the run's)"
    )
    parser.add_argument("--split", default="test", help="split of the data (default: test)")
    add_pair_columns(parser, "column of the images, or of whatever a student reads")
    parser.add_argument("--label-column", help="column of the labels (default: label, or that of a student's recipe)")
    parser.add_argument("--classes", help="class names: comma-separated, or a file with one per line")
    parser.add_argument(
        "--template", action="append", help="caption of a class, with {} for its name; may be repeated"
    )
    parser.add_argument("--max-rows", type=parse_positive, help="evaluate the first rows only")
    parser.add_argument("--batch-size", type=parse_positive, default=64, help="pairs or rows at a time (default: 64)")
    parser.add_argument("--num-workers", type=parse_not_negative, default=0, help="processes that decode (default: 0)")
    parser.add_argument("--output", help="also write the figures to this JSON file, as they come")
    parser.add_argument("--overwrite", action="store_true", help="replace the file of --output, whatever it holds")


def _evaluate(options: argparse.Namespace) -> None:
    quiet_libraries()
    _check_output(options.output, options.overwrite)
    from hf_dissect.evaluation.tables import format_distillation, format_retrieval
    from hf_dissect.runs.data_settings import parse_data_settings
    from hf_dissect.runs.evaluate import evaluate_checkpoint
    from hf_dissect.training.run_folder import replace_non_finite

    figures: dict[str, float] = {}

    def keep(so_far: dict[str, float]) -> None:
        figures.update(so_far)
        if options.output and is_first_process():
            content = json.dumps(replace_non_finite(figures), indent=2, allow_nan=False)
            Path(options.output).write_text(content + "\n", encoding="utf-8")

    try:
        evaluate_checkpoint(
            options.checkpoint,
            data=options.data,
            split=options.split,
            image_column=options.image_column,
            caption_column=options.caption_column,
            task_column=options.task_column,
            label_column=options.label_column,
            classes=_read_names(options.classes),
            templates=options.template,
            image_features=options.image_features,
            text_features=options.text_features,
            data_settings=parse_data_settings(options.overrides, "evaluate"),
            max_rows=options.max_rows,
            batch_size=options.batch_size,
            num_workers=options.num_workers,
            report=keep,
        )
    finally:
        # A later error does not lose the figures that were computed before it.
        if figures and is_first_process():
            of_student = "num_rows" in figures
            print(format_distillation(figures) if of_student else format_retrieval(figures), flush=True)


def _check_output(output: str | None, overwrite: bool) -> None:
    """Raise a ValueError if the figures could not be written, or would replace a file that holds something else."""
    if output is None:
        return
    path = Path(output)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ValueError(f"--output {output}: there is no folder to write it to; name a file in an existing folder.")
    if path.exists() and not overwrite and not _holds_figures(path):
        raise ValueError(
            f"--output {output} exists and does not hold the figures of an evaluation; name another file, or add "
            "--overwrite."
        )


def _holds_figures(path: Path) -> bool:
    """Return True for a file of an earlier evaluation, a JSON object of numbers, which may be replaced."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and all(isinstance(value, int | float | None) for value in content.values())


def _read_names(text: str | None) -> list[str] | None:
    """Read class names from a comma-separated list, or from a file with one per line."""
    if text is None:
        return None
    if os.path.isfile(text):  # Path.is_file would fail for a list longer than a file name may be
        return [line.strip() for line in Path(text).read_text(encoding="utf-8").splitlines() if line.strip()]
    return [name.strip() for name in text.split(",") if name.strip()]
