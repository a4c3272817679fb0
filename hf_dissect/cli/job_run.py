"""Carries out the recipe in a script that `hf-dissect job` wrote."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_dissect.cli import carry_out, parse_words
from hf_dissect.cli.options import add_overwrite, parse_positive
from hf_dissect.cli.output import is_first_process
from hf_dissect.cli.train import train
from hf_dissect.recipe.fields import RecipeError
from hf_dissect.recipe.recipe import Recipe
from hf_dissect.recipe.yaml import parse_yaml

_AFTER_INTERRUPT = "If a checkpoint was written, the same command continues from it."


def run_job(recipe: str, from_environment: Mapping[str, str], arguments: Sequence[str] | None = None) -> int:
    """Train a recipe, or continue a run of it that was broken off.

    Args:
        recipe: YAML of the recipe.
        from_environment: Environment variables of settings that are of one machine, by dotted key.
        arguments: Words of the command line; None for those of this process.

    Returns:
        The exit status, as of `hf-dissect train`; 0 also for a run that is already finished.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = _build_parser(parse_yaml(recipe), from_environment)
    try:
        options = parse_words(parser, words, parser.prog)
    except RecipeError as error:
        print(f"hf-dissect: {error}", file=sys.stderr)
        return 2
    if options.processes > 1 and "RANK" not in os.environ:
        return _launch(words, options.processes)
    options.recipe, options.from_environment, options.source = recipe, from_environment, parser.prog
    options.run, options.after_interrupt = _run, _AFTER_INTERRUPT
    return carry_out(options)


def _build_parser(settings: Mapping[str, Any], from_environment: Mapping[str, str]) -> argparse.ArgumentParser:
    variables = "".join(f"\n  {variable:32} {key}" for key, variable in from_environment.items())
    parser = argparse.ArgumentParser(
        prog=Path(sys.argv[0]).name,
        description=f"Train the recipe {settings['name']}. {settings.get('description') or ''}".rstrip(),
        epilog=f"environment variables, each for a setting that has no other value:{variables}" if variables else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings to change")
    parser.add_argument("--output-dir", help="run folder (default: the recipe's, or runs/<name of the recipe>)")
    given_folder = parser.add_mutually_exclusive_group()
    given_folder.add_argument(
        "--resume",
        action="store_true",
        help="continue from the last checkpoint, also of a run with other settings or a finished one (default: of an "
        "unfinished run with the same settings, if there is one)",
    )
    add_overwrite(given_folder, "an earlier run or model")
    parser.add_argument("--processes", type=parse_positive, default=1, help="processes on this machine, one for a GPU")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _launch(words: Sequence[str], processes: int) -> int:
    """Start this script once for each process, as torchrun does."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.call([*launcher, sys.argv[0], *words])


def _run(options: argparse.Namespace) -> None:
    settings = parse_yaml(options.recipe)
    kind: type[Any] = Recipe
    if "distillation" in settings:
        from hf_dissect.distillation.recipe import DistillationRecipe

        kind = DistillationRecipe
    overrides = [*_read_environment(options), *options.overrides]
    recipe = kind.from_dict(settings, options.source, overrides)
    from hf_dissect.runs.output_folder import replace_output_dir

    if options.output_dir is not None:
        recipe = replace_output_dir(recipe, options.output_dir)
    if options.resume or options.overwrite:
        train(recipe, resume=options.resume, overwrite=options.overwrite)
    elif _is_finished(recipe):
        if is_first_process():
            print(f"{recipe.output_dir} holds this run, finished; --overwrite trains it again")
    else:
        train(recipe, resume=_find_checkpoint(recipe) is not None)


def _read_environment(options: argparse.Namespace) -> list[str]:
    """Return the settings that environment variables give, where the command line gives none.

    Raises:
        RecipeError: Neither gives one.
    """
    given = {override.partition("=")[0].strip() for override in options.overrides}
    wanted = {
        key: name
        for key, name in options.from_environment.items()
        if not any(f"{key}.".startswith(f"{other}.") for other in given)  # the setting, or a section that it is in
    }
    if missing := [key for key, name in wanted.items() if not os.environ.get(name)]:
        raise RecipeError(
            options.source,
            [f"{key}: was of another machine; set {wanted[key]}, or give {key}=VALUE" for key in missing],
        )
    # A path in JSON is the same path in YAML, whatever it looks like.
    return [f"{key}={json.dumps(os.environ[name], ensure_ascii=False)}" for key, name in wanted.items()]


def _is_finished(recipe: Any) -> bool:
    """Check whether the run folder holds this run with all of its figures.

    Raises:
        ValueError: It holds a run with other settings.
    """
    folder = Path(recipe.output_dir)
    saved = folder / "recipe.yaml"
    if not saved.is_file():
        checkpoint = _find_checkpoint(recipe)
        if checkpoint is None:
            return False
        saved = checkpoint / "recipe.yaml"
    try:
        other = type(recipe).load(saved).to_dict()
    except ValueError:
        other = {}
    if changed := _list_changes(other, recipe.to_dict()):
        raise ValueError(
            f"{folder} holds a run with other settings ({', '.join(changed[:3])}{', ...' if changed[3:] else ''}); "
            "--resume continues it with these settings, --overwrite starts again, --output-dir names another folder."
        )
    try:
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return "unfinished" not in metrics


def _list_changes(old: Any, new: Any, key: str = "") -> list[str]:
    """Return the dotted keys of the settings that differ; the run folder is not one of them."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = [name for name in {**new, **old} if f"{key}{name}" != "training.output_dir"]
        return [change for name in names for change in _list_changes(old.get(name), new.get(name), f"{key}{name}.")]
    return [] if old == new else [key.rstrip(".")]


def _find_checkpoint(recipe: Any) -> Path | None:
    from hf_dissect.training.checkpoints import find_last_checkpoint

    return find_last_checkpoint(recipe.output_dir)
