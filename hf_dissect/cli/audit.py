"""`hf-dissect audit`: ranks the pairs of a data set by how likely they are mismatched."""

import argparse
from typing import TYPE_CHECKING

from hf_dissect.cli.options import add_command, add_pair_columns, parse_not_negative, parse_positive
from hf_dissect.cli.output import is_first_process, quiet_libraries

if TYPE_CHECKING:
    from hf_dissect.cli.options import Commands
    from hf_dissect.runs.audit import AuditResult

SUMMARY = "Rank the pairs of a data set by how likely image and caption do not belong together."
EPILOG = """examples:
  hf-dissect audit runs/quickstart                   the pairs that the run trained on
  hf-dissect audit openai/clip-vit-base-patch32 --data /data/pairs --num-workers 4
  hf-dissect audit runs/x --data user/pairs --split validation --output-dir audits/pairs
  hf-dissect audit runs/x --data /data/pairs --export-clean /data/pairs-clean --keep 0.8"""


def add_parser(commands: "Commands") -> None:
    """Add the command to `hf-dissect`."""
    parser = add_command(commands, "audit", _audit, SUMMARY, EPILOG)
    parser.add_argument("checkpoint", help="run folder, checkpoint folder or Hub id")
    parser.add_argument("--data", help="folder, file, .tar shards, Hub data set id or scenes (default: the run's)")
    parser.add_argument("--split", default="train", help="split of the data (default: train)")
    add_pair_columns(parser, "column of the images")
    parser.add_argument("--max-rows", type=parse_positive, help="audit the first rows only")
    parser.add_argument("--output-dir", default="audit", help="folder of the results (default: audit)")
    parser.add_argument(
        "--ledger", metavar="RUN", help="run that trained on these data, whose ledger columns are added"
    )
    parser.add_argument(
        "--export-clean", metavar="FOLDER", help="also write the data set without the suspicious pairs"
    )
    parser.add_argument("--keep", type=float, help="share of the pairs to keep there, the best ones")
    parser.add_argument("--threshold", type=float, help="keep the pairs up to this p_mismatched there (default: 0.5)")
    parser.add_argument(
        "--max-page-pairs", type=parse_positive, default=100_000, help="most pairs in audit.html (default: 100000)"
    )
    parser.add_argument("--batch-size", type=parse_positive, default=64, help="pairs per forward pass (default: 64)")
    parser.add_argument("--num-workers", type=parse_not_negative, default=0, help="processes that decode (default: 0)")


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
        text_features=options.text_features,
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
        _print_result(result)


def _print_result(result: "AuditResult") -> None:
    bad = len(result.bad_rows)
    print(f"\n{len(result.table) - bad:,} pairs, about {result.mismatched_share:.1%} of them mismatched")
    if result.auroc is not None:
        print(f"AUROC of the score against the truth in the data: {result.auroc:.3f}")
    if bad:
        reasons = ", ".join(f"{count:,} x {reason}" for reason, count in result.bad_rows.summary()["reasons"].items())
        print(f"{bad:,} pairs cannot be read ({reasons}); they are at the end of the table")
    print(f"scores  {result.folder / 'scores.parquet'}\npage    {result.folder / 'audit.html'}")
    if (export := result.export) is not None:
        dropped = export.pairs_before - export.pairs_after
        print(
            f"clean   {export.folder}: {dropped:,} of {export.pairs_before:,} pairs dropped, "
            f"{export.rows_after:,} of {export.rows_before:,} rows kept"
        )
