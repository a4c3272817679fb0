"""`hf-dissect push`: a finished run becomes a model repository of the Hub."""

import argparse
import sys

from hf_dissect.cli.process import add_command

AFTER_INTERRUPT = "Nothing was published; the same command goes on."
EPILOG = """examples:
  hf-dissect push runs/quickstart ada/quickstart
  hf-dissect push runs/mine ada/mine --private
  hf-dissect push runs/mine ada/mine --revision seed-1     another branch of the repository

Published are the model or adapter (of a distillation the student, and its encoder alone), the processor, recipe.yaml
without what is of this machine, metrics.json, the card and the report's picture; checkpoints, the ledger and
report.html with its pictures stay here. A push that broke off is repeated with the same command: what arrived is not
sent again."""


def add_parser(subparsers) -> None:
    """Add the command to those of `hf-dissect`."""
    summary = "Publish a finished run on the Hugging Face Hub."
    parser = add_command(subparsers, "push", _push, summary, EPILOG, AFTER_INTERRUPT)
    parser.add_argument("folder", metavar="RUN", help="folder of a finished run")
    add_repository_arguments(parser)


def add_repository_arguments(parser: argparse.ArgumentParser) -> None:
    """Where something is published to."""
    parser.add_argument("repo_id", metavar="REPO_ID", help="USER/REPO; it is created if it is not there")
    parser.add_argument("--private", action="store_true", default=None, help="create it as a private repository")
    parser.add_argument("--revision", help="branch to write to (default: main); created if it is not there")


def _push(options: argparse.Namespace) -> None:
    from hf_dissect.hub.push import push_run

    done = push_run(options.folder, options.repo_id, private=options.private, revision=options.revision)
    print(f"{len(done.files)} files  {done.url}")
    if done.left_out:
        print(f"left out, as it is of this machine: {', '.join(done.left_out)}", file=sys.stderr)
