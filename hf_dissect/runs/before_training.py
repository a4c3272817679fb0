"""Checks of all that a recipe names, before the first step: a mistake must not be found after hours of training."""

import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, Trainer, TrainingArguments, get_scheduler
from transformers.trainer_utils import SaveStrategy, SchedulerType
from transformers.training_args import OptimizerNames

from hf_dissect.hub.address import is_hub_address
from hf_dissect.hub.reachability import HubNeed, HubUnreachable, check_reachable, is_on_hub
from hf_dissect.hub.repository import HubError
from hf_dissect.recipe.file import RecipeFile
from hf_dissect.training.training_args import is_one_of_several_without_accelerator

logger = logging.getLogger(__name__)

_MODEL_KEYS = ("name_or_path", "second_name_or_path", "tokenizer", "processor", "reference")
_STATE_SHARE = 2  # the optimiser keeps two numbers for each weight


def check_surroundings(recipe: RecipeFile) -> None:
    """Check what a recipe needs of machine and Hub: a folder to write to, a device for its precision, an answer.

    Raises:
        HubUnreachable: The Hub does not answer.
        ValueError: Folder or device cannot be used; the message names the key of the recipe.
    """
    check_precision(recipe.training)
    check_output_dir(recipe.output_dir)
    check_reachable(list_hub_needs(recipe))


def check_precision(training: Mapping[str, Any]) -> None:
    """Check that this machine can train with `bf16`, `fp16` and `tf32`, as far as they are set.

    Args:
        training: Section `training` of a recipe.

    Raises:
        ValueError: It cannot; the message names the key of the recipe.
    """
    has_device = torch.accelerator.is_available()
    # Several processes that find no GPU train on the CPU, as if use_cpu were set.
    chooses_cpu = bool(training.get("use_cpu")) or is_one_of_several_without_accelerator()
    uses_cpu = chooses_cpu or not has_device
    reason = "training.use_cpu is true" if has_device else "this machine has none that torch sees"
    if training.get("tf32") and not (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)):
        raise ValueError("training.tf32: true needs an NVIDIA GPU of the generation Ampere or later; set it to null.")
    for name in ("fp16", "fp16_full_eval"):
        if training.get(name) and uses_cpu:
            raise ValueError(f"training.{name}: true needs a GPU, and {reason}; set it to false.")
    for name in ("bf16", "bf16_full_eval"):
        if training.get(name) and not has_device and not chooses_cpu:
            raise ValueError(
                f"training.{name}: true needs a GPU, and {reason}; set it to false, or training.use_cpu to true for "
                "bf16 on the CPU."
            )
    if (asked := os.environ.get("CUDA_VISIBLE_DEVICES", "")) not in ("", "-1") and uses_cpu:
        logger.warning("CUDA_VISIBLE_DEVICES=%s, but %s: this run uses the CPU.", asked, reason)


def check_output_dir(output_dir: str) -> None:
    """Check that files can be written to a folder, which is created and removed again where it is missing.

    Raises:
        ValueError: They cannot; the message names the key of the recipe.
    """
    folder = Path(output_dir)
    if int(os.environ.get("RANK", "0")) != 0:
        return  # the first of several processes writes
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".written-{os.getpid()}"
        probe.write_bytes(b"1" * 4096)
        probe.unlink()
    except OSError as error:
        occupied = next((path for path in (folder, *folder.parents) if path.is_file()), None)
        reason = f"{occupied} is a file" if occupied else error.strerror or str(error)
        raise ValueError(
            f"training.output_dir {output_dir!r}: no folder can be written there ({reason}); name another one, or run "
            "with --output-dir."
        ) from error
    finally:
        for path in missing:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def check_disk_space(model: torch.nn.Module, args: TrainingArguments) -> None:
    """Check that the model, and a checkpoint if any is written, fit on the disk of the run folder.

    Raises:
        ValueError: They do not; the message names the key of the recipe.
    """
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    trained = sum(weight.numel() * weight.element_size() for weight in model.parameters() if weight.requires_grad)
    kept = _STATE_SHARE + (getattr(args, "average_weights", None) is not None)
    needed = size if args.save_strategy == SaveStrategy.NO else 2 * size + kept * trained
    folder = Path(str(args.output_dir)).absolute()
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    if free < needed:
        raise ValueError(
            f"training.output_dir {str(args.output_dir)!r}: {free / 2**20:,.0f} MiB are free there, and the model "
            f"{'alone' if args.save_strategy == SaveStrategy.NO else 'with one checkpoint'} takes "
            f"{needed / 2**20:,.0f} MiB; make room, or name a folder on another disk."
        )


def check_optimizer(args: TrainingArguments, model: torch.nn.Module) -> None:
    """Check that the package of the optimiser is installed, and see `check_scheduler`.

    Raises:
        ValueError: It is not; the message names the key of the recipe.
    """
    check_scheduler(args)
    try:
        Trainer.get_optimizer_cls_and_kwargs(args, cast(PreTrainedModel, model))
    except ImportError as error:
        raise ValueError(f"training.optim={OptimizerNames(args.optim).value}: {error}") from error


def check_scheduler(args: TrainingArguments) -> None:
    """Check that the schedule of the learning rate has the settings that it needs.

    Raises:
        ValueError: It has not; the message names the key of the recipe.
    """
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    kind, options = SchedulerType(args.lr_scheduler_type), cast(dict[str, Any], args.lr_scheduler_kwargs or {})
    try:
        get_scheduler(kind, optimizer, 1, 10, scheduler_specific_kwargs=options)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"training.lr_scheduler_type={kind.value}, training.lr_scheduler_kwargs={options}: {error}"
        ) from error


def check_best_metric(args: TrainingArguments, known: Iterable[str]) -> None:
    """Check that `metric_for_best_model` is a figure of an evaluation.

    Args:
        args: Arguments of the run.
        known: Names of the figures of an evaluation.

    Raises:
        ValueError: It is not; the message names the key of the recipe.
    """
    wanted = args.metric_for_best_model
    uses_it = args.load_best_model_at_end or args.save_strategy == SaveStrategy.BEST
    names = ["loss", *known]
    if wanted is not None and uses_it and wanted.removeprefix("eval_") not in names:
        raise ValueError(
            f"training.metric_for_best_model: {wanted!r} is not a figure of the evaluation; allowed: "
            f"{', '.join(names)}."
        )


def check_splits(splits: Mapping[str, Any], named: Mapping[str, str | None], eval_strategy: str) -> None:
    """Check that the data have the splits that a recipe names.

    Args:
        splits: Rows by "train", "validation" and "test".
        named: Name of each split in the recipe, for those that differ from the default.
        eval_strategy: Setting `training.eval_strategy`.

    Raises:
        ValueError: A split is missing; the message names the key of the recipe.
    """
    for split, name in named.items():
        if name is not None and split not in splits:
            raise ValueError(
                f"data.{split}_split: the data have no split {name!r} (found: {', '.join(splits)}); name one that "
                "they have, or set it to null."
            )
    if eval_strategy != "no" and "validation" not in splits:
        raise ValueError(
            f"training.eval_strategy: {eval_strategy!r} needs a validation split, and the data have "
            f"{', '.join(splits)} only; name one with data.validation_split, or set training.eval_strategy to 'no'."
        )


@contextmanager
def name_training_keys(training: Mapping[str, Any]) -> Iterator[None]:
    """Begin the message of an error about trainer arguments with the keys of the recipe that it is about."""
    try:
        yield
    except (ValueError, TypeError, ImportError, OSError) as error:
        message = str(error)
        if isinstance(error, HubError):
            raise HubError(f"training.push_to_hub: {message}") from error
        if isinstance(error, HubUnreachable) or "training." in message:
            raise
        keys = [name for name in training if re.search(rf"(?<![a-z_]){re.escape(name)}(?![a-z_])", message)]
        if not keys:  # the message has the value alone
            texts = {name: value for name, value in training.items() if isinstance(value, str) and len(value) > 2}
            keys = [name for name, value in texts.items() if re.search(rf"\b{re.escape(value)}\b", message, re.I)]
        shown = ", ".join(f"training.{name}={training[name]!r}" for name in keys) or "training"
        raise ValueError(f"{shown}: {message}") from error


def list_hub_needs(recipe: RecipeFile) -> list[HubNeed]:
    """List what a recipe reads from the Hub or writes to it, of any kind of recipe."""
    needs = list(_walk(recipe.to_dict(), ""))
    if recipe.training.get("push_to_hub"):
        name = recipe.training.get("hub_model_id") or Path(recipe.output_dir).name
        way_out = "set training.push_to_hub to false and publish later with hf-dissect push"
        needs.append(HubNeed("training.push_to_hub", name, way_out=way_out))
    return needs


def _walk(settings: Mapping[str, Any], where: str) -> Iterator[HubNeed]:
    if settings.get("source") == "hub" and settings.get("path"):
        yield HubNeed(f"{where}path", settings["path"], "dataset", "set the source to folder for local files")
    for name, value in settings.items():
        if isinstance(value, Mapping):
            if name not in ("training", "config"):
                yield from _walk(value, f"{where}{name}.")
        elif name in _MODEL_KEYS and isinstance(value, str) and is_on_hub(value):
            yield HubNeed(f"{where}{name}", value)
        elif name in ("ledger", "sampling_file") and is_hub_address(value):
            yield HubNeed(f"{where}{name}", value.removeprefix("hub:").partition("@")[0], "dataset")
        elif name == "path" and isinstance(value, str) and value.startswith("hf://"):
            yield HubNeed(f"{where}{name}", value, "dataset", "copy the files here first")
