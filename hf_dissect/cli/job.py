"""`hf-dissect job`: one Python file that trains a recipe on another machine."""

import argparse
import sys
from typing import TYPE_CHECKING

from hf_dissect.cli.options import add_command, load_recipe
from hf_dissect.cli.train import choose_kind
from hf_dissect.version import __version__

if TYPE_CHECKING:
    from hf_dissect.cli.options import Commands

SUMMARY = "Print a script that trains a recipe on another machine, with all that it needs in one file."
EPILOG = """examples:
  hf-dissect job quickstart > job.py
  hf-dissect job mine.yaml data.source=hub data.path=ada/pairs training.push_to_hub=true > job.py
  hf-dissect job mine.yaml --package "hf_dissect @ git+https://HOST/hf-dissect" --flavor l4x1 --timeout 4h > job.py
  uv run job.py training.max_steps=100               on any machine with uv
  hf jobs uv run job.py                              on a GPU of the Hub

The script names its packages (PEP 723), in the versions that are installed here. hf_dissect has no release on PyPI
yet: until there is one, name a place to install it from with --package. A path of this machine is not written into
the script, but read from an environment variable where it runs; this command says which."""


def add_parser(commands: "Commands") -> None:
    """Add the command to `hf-dissect`."""
    parser = add_command(commands, "job", _job, SUMMARY, EPILOG)
    parser.add_argument("recipe", help="YAML file, name of a shipped recipe, or hub:USER/REPO")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings to change")
    parser.add_argument(
        "--package",
        metavar="REQUIREMENT",
        help=f"how hf_dissect is installed, or the address of a wheel (default: hf_dissect=={__version__})",
    )
    parser.add_argument(
        "--with", dest="packages", action="append", default=[], metavar="REQUIREMENT", help="a further package"
    )
    parser.add_argument("--flavor", help="hardware for `hf jobs uv run`, such as l4x1 (see `hf jobs hardware`)")
    parser.add_argument("--timeout", help="longest duration for `hf jobs uv run`, such as 4h")
    parser.set_defaults(output_dir=None)


def _job(options: argparse.Namespace) -> None:
    recipe = load_recipe(options, options.overrides, choose_kind(options.recipe))
    from hf_dissect.runs.job_script import OWN_REQUIREMENT, write_job_script

    script = write_job_script(
        recipe,
        package=OWN_REQUIREMENT if options.package is None else options.package,
        more_packages=options.packages,
        flavor=options.flavor,
        timeout=options.timeout,
    )
    for note in script.notes:
        print(note, file=sys.stderr)
    for key, variable in script.from_environment.items():
        print(f"{key} is of this machine: set {variable} where the job runs, or give it {key}=...", file=sys.stderr)
    if options.package is None:
        print(
            f"The script installs {OWN_REQUIREMENT}, which is not on PyPI yet; --package names another place.",
            file=sys.stderr,
        )
    _print(script.text)


def _print(text: str) -> None:
    """Print a Python file, which is UTF-8 whatever the encoding of this terminal."""
    sys.stdout.flush()
    if hasattr(sys.stdout, "buffer"):
        sys.stdout.buffer.write(text.encode())
        sys.stdout.buffer.flush()
    else:
        sys.stdout.write(text)
