"""The `hf-dissect` command and, of its commands, those that compare and list recipes."""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from hf_dissect.cli import audit, evaluate, push, push_ledger, train
from hf_dissect.cli.process import add_command, is_first_process, quiet_libraries
from hf_dissect.recipe.file import read_description, shipped_recipes
from hf_dissect.recipe.launch_configs import read_summary, shipped_launch_configs
from hf_dissect.recipe.recipe import RecipeError
from hf_dissect.version import __version__

EPILOGS = {
    "compare": """examples:
  hf-dissect compare recipes/quickstart.yaml
  hf-dissect compare quickstart --strategies random,dissect,dissect:momentum --seeds 0,1,2
  hf-dissect compare flickr8k-features data.path=/data/flickr8k --output-dir runs/flickr8k
  hf-dissect compare runs/flickr8k/recipe.yaml       repeat a comparison from its own folder""",
    "recipes": """examples:
  hf-dissect recipes
  hf-dissect recipes quickstart > mine.yaml          a copy to change
  hf-dissect recipes --accelerate                    ways to use several GPUs or machines
  hf-dissect recipes --accelerate multi-gpu > multi-gpu.yaml""",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status, 2 for settings or data that cannot work."""
    options = _parse(arguments)
    level = logging.WARNING if is_first_process() else logging.ERROR  # each process would say the same
    logging.basicConfig(format="%(levelname)s: %(message)s", level=level)
    try:
        options.run(options)
    except KeyboardInterrupt:
        print(f"\nInterrupted. {options.after_interrupt}".rstrip(), file=sys.stderr)
        return 130
    except SystemExit as stop:  # StoppedBySignal, after a checkpoint
        print(f"\nhf-dissect: {stop} {options.after_interrupt}".rstrip(), file=sys.stderr)
        return stop.code
    except Exception as error:
        if options.debug or not _is_for_the_user(error):
            raise
        print(f"hf-dissect: {error}", file=sys.stderr)
        return 2
    _leave_process_group()
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse; settings may stand before or behind options, which argparse by itself does not allow."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    unknown = [part for part in rest if part.startswith("-") or "=" not in part or not hasattr(options, "overrides")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _is_for_the_user(error: Exception) -> bool:
    """Whether an error names what to change; anything else is a fault of the program and keeps its traceback."""
    if isinstance(error, RecipeError | FileNotFoundError | ValueError):
        return True
    # Not imported at the top: the recipe commands must not wait for torch.
    from hf_dissect.data.bad_rows import TooManyBadRows
    from hf_dissect.trainer import NonFiniteLossError
    from hf_dissect.training.interruption import DataWorkerDied

    # ImportError: a setting that needs a package which is not there, such as a tracker or an optimiser.
    return isinstance(error, TooManyBadRows | NonFiniteLossError | DataWorkerDied | OSError | ImportError)


def _compare(options: argparse.Namespace) -> None:
    overrides = list(options.overrides)
    if options.strategies is not None:
        overrides.append(f"compare.strategies={json.dumps([part.strip() for part in options.strategies.split(',')])}")
    if options.seeds is not None:
        overrides.append(f"compare.seeds=[{options.seeds}]")
    recipe = train.recipe_of_options(options, overrides)
    quiet_libraries()
    from hf_dissect.evaluation import format_results_table
    from hf_dissect.runs.compare import TABLE_COLUMNS, TABLE_DECIMALS, TABLE_LEGEND, compare
    from hf_dissect.runs.run import free_output_dir

    recipe = recipe if options.overwrite or options.resume else free_output_dir(recipe)
    comparison = compare(recipe, resume=options.resume, announce=_announce)
    if not is_first_process():
        return
    known = {
        key: name for key, name in TABLE_COLUMNS.items() if any(_has(row.get(key)) for row in comparison["table"])
    }
    print(f"\n{format_results_table(comparison['table'], known, TABLE_DECIMALS)}\n\n{TABLE_LEGEND}\n")
    print(f"report  {Path(recipe.output_dir) / 'report.html'}\nfigures {Path(recipe.output_dir) / 'metrics.json'}")


def _recipes(options: argparse.Namespace) -> None:
    if options.accelerate:
        kind, shipped, describe = "accelerate configuration", shipped_launch_configs(), read_summary
    else:
        kind, shipped, describe = "recipe", shipped_recipes(), read_description
    if options.name is not None:
        if options.name not in shipped:
            raise RecipeError(options.name, [f"no such {kind}; shipped are {', '.join(shipped)}"])
        print(shipped[options.name].read_text(encoding="utf-8"), end="")
        return
    width = max(map(len, shipped))
    for name, path in shipped.items():
        print(f"{name:{width}}  {describe(path)}")


def _announce(text: str) -> None:
    if is_first_process():
        print(f"\n{text}", flush=True)


def _has(value: object) -> bool:
    return value is not None and not (isinstance(value, dict) and value.get("mean") is None)


def _leave_process_group() -> None:
    """What torch asks for at the end of a process that trained together with others."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.barrier()  # the first process writes more than the others; who leaves before it may be aborted
        distributed.destroy_process_group()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-dissect", description="Train CLIP-like models on the image-text pairs that are worth a gradient."
    )
    parser.add_argument("--version", action="version", version=f"hf-dissect {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    train.add_parser(commands)
    summary = "Run a recipe with several strategies and seeds and print a table."
    told = "The runs that were done, and their table, stand in the folder."
    compare = add_command(commands, "compare", _compare, summary, EPILOGS["compare"], told)
    train.add_recipe_arguments(compare)
    compare.add_argument("--strategies", help="comma-separated, as name or name:variant (default: the recipe's)")
    compare.add_argument("--resume", action="store_true", help="take over the runs that finished before")
    compare.add_argument("--seeds", help="comma-separated integers (default: the recipe's)")
    compare.add_argument(
        "--overwrite", action="store_true", help="write over an earlier comparison instead of into a new folder"
    )

    evaluate.add_parser(commands)
    audit.add_parser(commands)

    summary = "List the shipped recipes or accelerate configurations, or print one."
    recipes = add_command(commands, "recipes", _recipes, summary, EPILOGS["recipes"])
    recipes.add_argument("name", nargs="?", help="print this one instead of the list")
    recipes.add_argument(
        "--accelerate", action="store_true", help="the configurations of accelerate launch instead of the recipes"
    )
    push.add_parser(commands)
    push_ledger.add_parser(commands)
    return parser
