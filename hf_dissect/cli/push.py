"""`hf-dissect push`: publishes a finished run as a model repository of the Hub."""

import argparse
import sys
from typing import TYPE_CHECKING

from hf_dissect.cli.options import add_command, add_repository_arguments

if TYPE_CHECKING:
    from hf_dissect.cli.options import Commands

SUMMARY = "Publish a finished run on the Hugging Face Hub."
AFTER_INTERRUPT = "Nothing was published; repeat the same command to continue."
EPILOG = """examples:
  hf-dissect push runs/quickstart ada/quickstart
  hf-dissect push runs/mine ada/mine --private
  hf-dissect push runs/mine ada/mine --revision seed-1     another branch of the repository

Published are the model or adapter (of a distillation the student, and its encoder alone), the processor, recipe.yaml
without the paths of this machine, metrics.json, the card and the report's picture. Checkpoints, the ledger and
report.html with its pictures stay here. Repeat the same command after a push that broke off: files that arrived are
not sent again."""


def add_parser(commands: "Commands") -> None:
    """Add the command to `hf-dissect`."""
    parser = add_command(commands, "push", _push, SUMMARY, EPILOG, AFTER_INTERRUPT)
    parser.add_argument("folder", metavar="RUN", help="folder of a finished run")
    add_repository_arguments(parser)


def _push(options: argparse.Namespace) -> None:
    from hf_dissect.hub.push import push_run

    done = push_run(options.folder, options.repo_id, private=options.private, revision=options.revision)
    print(f"{len(done.files)} files  {done.url}")
    if done.left_out:
        print(f"left out, as it is of this machine: {', '.join(done.left_out)}", file=sys.stderr)
