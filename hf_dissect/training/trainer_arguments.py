"""Arguments of the Hugging Face Trainer that contrastive training cannot use, each refused with the way out."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

logger = logging.getLogger(__name__)

_WITHOUT_LABELS = "the loss compares the pairs of a batch and knows no labels"
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "label_smoothing_factor": ((0.0,), f"{_WITHOUT_LABELS}; leave it out, or soften the targets with gsc"),
    "train_sampling_strategy": (
        ("random", "sequential"),
        "batches of captions of one length would make negatives that differ less; use 'random' or 'sequential'",
    ),
    "auto_find_batch_size": (
        (False,),
        "a smaller batch has fewer negatives and is another objective; lower per_device_train_batch_size yourself, or "
        "set grad_cache_chunk_size, which gives the loss of the whole batch in less memory",
    ),
    "fp16_full_eval": (
        (False,),
        "it would leave the model itself in half precision; use fp16, which evaluation uses, too",
    ),
    "bf16_full_eval": (
        (False,),
        "it would leave the model itself in half precision; use bf16, which evaluation uses, too",
    ),
}
"""Allowed values of arguments of the Trainer, and the reason and way out for others."""
_FOR_OWN_METRICS = {
    "batch_eval_metrics": (False, "a caption is ranked among all images, not those of its batch"),
    "eval_do_concat_batches": (True, "a caption is ranked among all images, which must be one table"),
}
_SPEED = ("runtime", "samples_per_second", "steps_per_second")


def check_trainer_arguments(args: Any, given: Mapping[str, Any]) -> None:
    """Check that the run can use the arguments of the Trainer.

    Args:
        args: Training arguments.
        given: Further arguments of `transformers.Trainer`, by name.

    Raises:
        ValueError: An argument would have no effect or a wrong one; the message names the way out.
    """
    for name, (allowed, reason) in _REFUSED.items():
        if (value := getattr(args, name)) not in allowed:
            raise ValueError(f"{name}={value!r} cannot be used: {reason}.")
    if given.get("compute_loss_func") is not None:
        raise ValueError(
            f"compute_loss_func cannot be used: {_WITHOUT_LABELS}. Override compute_loss in a subclass of "
            "DissectTrainer, which also gets the ids and weights of the pairs."
        )
    if given.get("compute_metrics") is None:
        for name, (needed, reason) in _FOR_OWN_METRICS.items():
            if getattr(args, name) != needed:
                raise ValueError(
                    f"{name}={not needed} cannot be used with the retrieval figures: {reason}. Leave it at "
                    f"{needed}, or pass compute_metrics."
                )


@contextmanager
def keep_all_rows(args: TrainingArguments) -> Iterator[None]:
    """Ignore `dataloader_drop_last` inside the block, which makes a loader of data to evaluate."""
    drop_last, args.dataloader_drop_last = args.dataloader_drop_last, False
    try:
        yield
    finally:
        args.dataloader_drop_last = drop_last


def check_best_metric(args: Any, given: Mapping[str, Any], figures: Iterable[str], evaluation: Any) -> None:
    """Check that the evaluation gives the figure that the best checkpoint is chosen by.

    Args:
        args: Training arguments.
        given: Further arguments of `transformers.Trainer`; with `compute_metrics`, any figure may exist.
        figures: Names of the figures of an evaluation.
        evaluation: Evaluation data, or a dict of several; None without any.

    Raises:
        ValueError: There is no such figure, or no evaluation.
    """
    name = args.metric_for_best_model
    if name is None or "compute_metrics" in given or args.prediction_loss_only:
        return
    parts = [f"{part}_" for part in evaluation] if isinstance(evaluation, dict) else [""]
    known = [f"{part}{figure}" for part in parts for figure in ("loss", *figures)]
    if name.removeprefix("eval_") not in [*known, *(f"{part}{speed}" for part in parts for speed in _SPEED)]:
        raise ValueError(
            f"metric_for_best_model={name!r} is not a figure of the evaluation; allowed: {', '.join(known)}."
        )


def check_grad_cache(model: nn.Module, args: Any, uses_deepspeed: bool) -> None:
    """Check that a run with `grad_cache_chunk_size` can make several backward passes in a step.

    Args:
        model: Model, whose batch norm is warned of.
        args: Arguments of the run.
        uses_deepspeed: True for a run with DeepSpeed.

    Raises:
        ValueError: DeepSpeed, `torch.nn.DataParallel` or the optimiser allows one backward pass only.
    """
    if args.grad_cache_chunk_size is None:
        return
    optimizer = OptimizerNames(args.optim).value
    unfit = {
        "DeepSpeed": uses_deepspeed,
        "torch.nn.DataParallel": args.n_gpu > 1,
        f"optim {optimizer}": "lomo" in optimizer,
    }
    for name in (name for name, used in unfit.items() if used):
        raise ValueError(
            f"grad_cache_chunk_size={args.grad_cache_chunk_size} makes several backward passes in a step, which "
            f"{name} does not allow; use one process for each GPU (accelerate launch, DDP or FSDP) and an optimiser "
            "that steps once, or leave it out."
        )
    norms = (part for part in model.modules() if isinstance(part, torch.nn.modules.batchnorm._BatchNorm))
    if any(all(weight.requires_grad for weight in norm.parameters()) for norm in norms):
        logger.warning(
            "The model has batch norm, which with grad_cache_chunk_size normalises over a chunk of a batch."
        )


def check_trainable(model: Any, args: Any) -> None:
    """Check that weights of a model train, and that it can be noised and saved as the arguments ask.

    Raises:
        ValueError: No weight trains, the adapters cannot be saved, or `neftune_noise_alpha` has nothing to noise.
    """
    if not any(weight.requires_grad for weight in model.parameters()):
        raise ValueError(
            "No weight of the model trains: requires_grad is False for all of them. Load an adapter with "
            "is_trainable=True, or release weights with requires_grad_(True)."
        )
    if args.neftune_noise_alpha is not None:
        try:
            model.get_input_embeddings()
        except NotImplementedError as error:
            raise ValueError(
                f"neftune_noise_alpha={args.neftune_noise_alpha} adds noise to the input embeddings, which "
                f"{type(model).__name__}, a model with two towers, does not name; leave it out."
            ) from error
    if getattr(model, "_hf_peft_config_loaded", False) is True and len(names := model.active_adapters()) > 1:
        raise ValueError(
            f"The adapters {', '.join(names)} are active at once, which save_pretrained cannot write; choose one with "
            "model.set_adapter."
        )


def refuse_search(backend: Any) -> None:
    """Refuse a hyper-parameter search inside one trainer, whose ledger would hold the scores of earlier trials.

    Args:
        backend: Backend of the search; None without one.

    Raises:
        ValueError: There is one.
    """
    if backend is not None:
        raise ValueError(
            "hyperparameter_search cannot be used: the ledger, the strategy and the arguments of the selection belong "
            "to one run. Make a new DissectTrainer for each trial, in the objective of your search library."
        )
