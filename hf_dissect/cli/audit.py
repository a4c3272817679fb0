"""`hf-dissect audit`: ranks the pairs of a data set by how likely they are mismatched, with a model or without."""

import argparse
import re
from typing import TYPE_CHECKING

from hf_dissect.cli.options import add_command, add_data_settings, add_pair_columns, parse_not_negative, parse_positive
from hf_dissect.cli.output import is_first_process, quiet_libraries

if TYPE_CHECKING:
    from hf_dissect.cli.options import Commands
    from hf_dissect.runs.audit import AuditResult

SUMMARY = "Rank the pairs of a data set by how likely image and caption do not belong together."
EPILOG = """examples:
  hf-dissect audit --fit /data/pairs                 without a model: encoders are fitted to the data
  hf-dissect audit --fit /data/pairs --export-clean /data/pairs-clean --max-fdr 0.05
  hf-dissect audit --fit /data/export.csv data.separator=';' data.image_root=/data/pictures
  hf-dissect audit openai/clip-vit-base-patch32 --data /data/pairs --num-workers 4
  hf-dissect audit runs/x --data user/pairs --split validation --output-dir audits/pairs
  hf-dissect audit runs/x --data /data/pairs --export-clean /data/pairs-clean --keep 0.8"""


def add_parser(commands: "Commands") -> None:
    """Add the command to `hf-dissect`."""
    parser = add_command(commands, "audit", _audit, SUMMARY, EPILOG)
    parser.add_argument("checkpoint", nargs="?", help="run folder, checkpoint folder or Hub id")
    add_data_settings(parser)
    parser.add_argument("--data", help="folder, file, tar shards, Hub data set id or scenes (default: the run's)")
    parser.add_argument(
        "--fit",
        metavar="DATA",
        help="audit these data without a checkpoint, by small encoders fitted to parts of them",
    )
    parser.add_argument("--folds", type=parse_positive, help="parts of the data for --fit, at least 2 (default: 2)")
    parser.add_argument("--model", help="model whose image encoder --fit uses (default: stored features, or none)")
    parser.add_argument("--seed", type=parse_not_negative, help="seed of --fit (default: 0)")
    parser.add_argument("--split", default="train", help="split of the data (default: train)")
    add_pair_columns(parser, "column of the images")
    parser.add_argument("--id-column", help="column of the ids, which the table shows (default: row numbers)")
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
        "--max-fdr", type=float, help="keep as many pairs there as have at most this expected share of mismatched ones"
    )
    parser.add_argument(
        "--export-anyway", action="store_true", help="export even if the scores know too little of these pairs"
    )
    parser.add_argument(
        "--max-page-pairs", type=parse_positive, default=100_000, help="most pairs in audit.html (default: 100000)"
    )
    parser.add_argument("--batch-size", type=parse_positive, default=64, help="pairs per forward pass (default: 64)")
    parser.add_argument("--num-workers", type=parse_not_negative, default=0, help="processes that decode (default: 0)")


def _audit(options: argparse.Namespace) -> None:
    quiet_libraries()
    if options.checkpoint is not None and re.match(r"\w+(\.\w+)+=", options.checkpoint):
        # With --fit there is no checkpoint, in whose place the first setting stands.
        options.checkpoint, options.overrides = None, [options.checkpoint, *options.overrides]
    _check(options)
    from hf_dissect.runs.data_settings import parse_data_settings

    given = {
        "data_settings": parse_data_settings(options.overrides, "audit"),
        "split": options.split,
        "image_column": options.image_column,
        "caption_column": options.caption_column,
        "id_column": options.id_column,
        "image_features": options.image_features,
        "max_rows": options.max_rows,
        "output_dir": options.output_dir,
        "export_to": options.export_clean,
        "keep": options.keep,
        "threshold": options.threshold,
        "max_fdr": options.max_fdr,
        "export_anyway": options.export_anyway,
        "max_page_pairs": options.max_page_pairs,
        "batch_size": options.batch_size,
        "num_workers": options.num_workers,
    }
    if options.fit is not None:
        from hf_dissect.runs.audit_fit import audit_by_fit

        given |= {"model": options.model, "folds": options.folds or 2, "seed": options.seed or 0}
        result = audit_by_fit(options.fit, **given)
    else:
        from hf_dissect.runs.audit import audit

        given |= {"data": options.data, "task_column": options.task_column, "ledger": options.ledger}
        given["text_features"] = options.text_features
        result = audit(options.checkpoint, **given)
    if is_first_process():
        _print_result(result)


def _check(options: argparse.Namespace) -> None:
    """Check that the options are those of one kind of audit.

    Raises:
        ValueError: Neither or both of a checkpoint and `--fit` are given, or options of the other kind.
    """
    if options.fit is None and options.checkpoint is None:
        raise ValueError("Name a checkpoint to audit by, or let encoders be fitted to the data: --fit DATA")
    if options.fit is not None and options.checkpoint is not None:
        raise ValueError(
            f"--fit {options.fit} audits without a checkpoint; leave out {options.checkpoint}, or name it as --model "
            "to use its image encoder."
        )
    by_checkpoint = {"--data": options.data, "--task-column": options.task_column, "--ledger": options.ledger}
    by_fit = {"--folds": options.folds, "--model": options.model, "--seed": options.seed}
    unsuitable = by_checkpoint if options.fit is not None else by_fit
    if wrong := [name for name, value in unsuitable.items() if value is not None]:
        kind = "an audit with --fit" if options.fit is not None else "an audit by a checkpoint"
        raise ValueError(f"{', '.join(wrong)}: not a setting of {kind}; leave it out.")


def _print_result(result: "AuditResult") -> None:
    bad = len(result.bad_rows)
    print(f"\n{len(result.table) - bad:,} pairs, share of mismatched ones {result.describe_share()}")
    if result.separation is not None:
        print(f"AUROC of pairs that belong together against recombined ones, estimated: {result.separation:.2f}")
    if result.num_trained:
        ranks = result.origin_of_ranks or "the model as it is now, which finds nothing that it has learnt by heart"
        print(f"The model trained on {result.num_trained:,} of these pairs; they are ranked by: {ranks}")
        print("To find mismatched pairs among them, run: hf-dissect audit --fit DATA")
    if result.auroc is not None:
        print(f"AUROC of the ranking against the truth in the data: {result.auroc:.3f}")
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
