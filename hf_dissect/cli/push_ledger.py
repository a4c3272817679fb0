"""`hf-dissect push-ledger`: publishes the scores of a run's pairs as a data set of the Hub."""

import argparse
from typing import TYPE_CHECKING

from hf_dissect.cli.options import add_command, add_repository_arguments
from hf_dissect.cli.push import AFTER_INTERRUPT

if TYPE_CHECKING:
    from hf_dissect.cli.options import Commands

SUMMARY = "Publish the scores of a run's pairs as a data set of the Hugging Face Hub."
EPILOG = """examples:
  hf-dissect push-ledger runs/mine ada/mine-scores
  hf-dissect push-ledger runs/mine ada/mine-scores --private
  hf-dissect train other.yaml selection.ledger=hub:ada/mine-scores selection.warmup_epochs=0

Published are ids and scores as Parquet files, and a card. Captions, images and file names stay here."""


def add_parser(commands: "Commands") -> None:
    """Add the command to `hf-dissect`."""
    parser = add_command(commands, "push-ledger", _push_ledger, SUMMARY, EPILOG, AFTER_INTERRUPT)
    parser.add_argument("folder", metavar="RUN", help="folder of a run, or one of its checkpoints")
    add_repository_arguments(parser)


def _push_ledger(options: argparse.Namespace) -> None:
    from hf_dissect.runs.push_ledger import push_ledger

    done = push_ledger(options.folder, options.repo_id, private=options.private, revision=options.revision)
    print(f"{len(done.files)} files  {done.url}")
