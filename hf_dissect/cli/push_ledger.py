"""`hf-dissect push-ledger`: the scores of a run's pairs become a data set of the Hub."""

import argparse

from hf_dissect.cli.process import add_command
from hf_dissect.cli.push import AFTER_INTERRUPT, add_repository_arguments

EPILOG = """examples:
  hf-dissect push-ledger runs/mine ada/mine-scores
  hf-dissect push-ledger runs/mine ada/mine-scores --private
  hf-dissect train other.yaml selection.ledger=hub:ada/mine-scores selection.warmup_epochs=0

Published are ids and scores as Parquet with a card; no caption, no image, no name of a file."""


def add_parser(subparsers) -> None:
    """Add the command to those of `hf-dissect`."""
    summary = "Publish the scores of a run's pairs as a data set of the Hugging Face Hub."
    parser = add_command(subparsers, "push-ledger", _push_ledger, summary, EPILOG, AFTER_INTERRUPT)
    parser.add_argument("folder", metavar="RUN", help="folder of a run, or one of its checkpoints")
    add_repository_arguments(parser)


def _push_ledger(options: argparse.Namespace) -> None:
    from hf_dissect.runs.push_ledger import push_ledger

    done = push_ledger(options.folder, options.repo_id, private=options.private, revision=options.revision)
    print(f"{len(done.files)} files  {done.url}")
