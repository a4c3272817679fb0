"""The command `hf-dissect audit`."""

import argparse
from typing import TYPE_CHECKING

from hf_dissect.cli.process import (
    add_command,
    add_pair_columns,
    is_first_process,
    not_negative,
    positive,
    quiet_libraries,
)

if TYPE_CHECKING:
    from hf_dissect.runs.audit import AuditResult

SUMMARY = "Rank the pairs of a data set by how likely image and caption do not belong together."
EPILOG = """examples:
  hf-dissect audit runs/quickstart                   the pairs that the run trained on
  hf-dissect audit openai/clip-vit-base-patch32 --data /data/pairs --num-workers 4
  hf-dissect audit runs/x --data user/pairs --split validation --output-dir audits/pairs
  hf-dissect audit runs/x --data /data/pairs --export-clean /data/pairs-clean --keep 0.8"""


def add_parser(subparsers) -> None:
    """Add the command to those of `hf-dissect`."""
    part = add_command(subparsers, "audit", _audit, SUMMARY, EPILOG)
    part.add_argument("checkpoint", help="run folder, checkpoint folder or Hub id")
    part.add_argument("--data", help="folder, file, .tar shards, Hub data set id or scenes (default: the run's)")
    part.add_argument("--split", default="train", help="split of the data (default: train)")
    add_pair_columns(part, "column of the images")
    part.add_argument("--max-rows", type=positive, help="audit the first rows only")
    part.add_argument("--output-dir", default="audit", help="folder of the results (default: audit)")
    part.add_argument("--ledger", metavar="RUN", help="run that trained on these data; its ledger's columns are added")
    part.add_argument("--export-clean", metavar="FOLDER", help="also write the data set without the suspicious pairs")
    part.add_argument("--keep", type=float, help="share of the pairs to keep there, the best")
    part.add_argument("--threshold", type=float, help="keep the pairs up to this p_mismatched there (default: 0.5)")
    part.add_argument(
        "--max-page-pairs", type=positive, default=100_000, help="pairs in audit.html at most (default: 100000)"
    )
    part.add_argument("--batch-size", type=positive, default=64, help="pairs a forward pass (default: 64)")
    part.add_argument("--num-workers", type=not_negative, default=0, help="processes that decode (default: 0)")


def _audit(options: argparse.Namespace) -> None:
    quiet_libraries()
    from hf_dissect.runs.audit import audit

    result = audit(
        options.checkpoint,
        data=options.data,
        split=options.split,
        image_column=options.image_column,
        caption_column=options.caption_column,
        task_column=options.task_column,
        image_features=options.image_features,
        max_rows=options.max_rows,
        output_dir=options.output_dir,
        ledger=options.ledger,
        export_to=options.export_clean,
        keep=options.keep,
        threshold=options.threshold,
        max_page_pairs=options.max_page_pairs,
        batch_size=options.batch_size,
        num_workers=options.num_workers,
    )
    if is_first_process():
        _tell(result)


def _tell(result: "AuditResult") -> None:
    bad = len(result.bad_rows)
    print(f"\n{len(result.table) - bad:,} pairs, about {result.mismatched_share:.1%} of them mismatched")
    if result.auroc is not None:
        print(f"AUROC of the score, by the truth that the data tell: {result.auroc:.3f}")
    if bad:
        reasons = ", ".join(f"{count:,} x {reason}" for reason, count in result.bad_rows.summary()["reasons"].items())
        print(f"{bad:,} pairs cannot be read ({reasons}); they stand at the end of the table")
    print(f"scores  {result.folder / 'scores.parquet'}\npage    {result.folder / 'audit.html'}")
    if (export := result.export) is not None:
        dropped = export.pairs_before - export.pairs_after
        print(
            f"clean   {export.folder}: {dropped:,} of {export.pairs_before:,} pairs dropped, "
            f"{export.rows_after:,} of {export.rows_before:,} rows kept"
        )
