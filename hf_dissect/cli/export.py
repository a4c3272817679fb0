"""`hf-dissect export`: writes the model of a run in the form of another library."""

import argparse
from typing import TYPE_CHECKING

from hf_dissect.cli.options import add_command

if TYPE_CHECKING:
    from hf_dissect.cli.options import Commands

SUMMARY = "Write the model of a run for open_clip or sentence-transformers."
AFTER_INTERRUPT = "Nothing was written."
EPILOG = """examples:
  hf-dissect export runs/mine mine-open-clip --format open_clip
  hf-dissect export runs/mine mine-open-clip --format open_clip --repo-id ada/mine    to be published there
  hf-dissect export runs/mola birds --format sentence-transformers --task birds

An adapter is merged into its base; of a MoLA adapter with an expert for each task, --task names the one. A run folder
is loaded by sentence-transformers as it is, too: the export is for adapters, and for machines without hf_dissect."""


def add_parser(commands: "Commands") -> None:
    """Add the command to `hf-dissect`."""
    parser = add_command(commands, "export", _export, SUMMARY, EPILOG, AFTER_INTERRUPT)
    parser.add_argument("source", metavar="RUN", help="folder of a run or of a model, hub:USER/REPO, or a Hub id")
    parser.add_argument("folder", metavar="DIR", help="folder to write; must not exist, or be empty")
    parser.add_argument("--format", required=True, choices=("open_clip", "sentence-transformers"), help="library")
    parser.add_argument("--task", help="task whose experts are merged, by name or number (MoLA of variant grad)")
    parser.add_argument("--repo-id", help="USER/REPO that DIR will be published in (open_clip finds its tokenizer so)")


def _export(options: argparse.Namespace) -> None:
    from hf_dissect.interop.export import export_run
    from hf_dissect.runs.saved_model import fetch_model

    run = fetch_model(options.source)
    print(export_run(run, options.folder, options.format, task=options.task, repo_id=options.repo_id))
