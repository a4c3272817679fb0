"""Preparation of the training data, and checks that data, model and arguments fit before a run starts."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_dissect.data.caption_lengths import choose_caption_lengths
from hf_dissect.data.first_pairs import check_first_pairs, check_images_fit
from hf_dissect.data.pair_weights import check_weighted
from hf_dissect.data.pairs import as_pairs
from hf_dissect.data_collator import SelectionCollator, find_side, find_tokenizer
from hf_dissect.evaluation.recall import RETRIEVAL_FIGURES
from hf_dissect.hub.pull import read_shared_scores
from hf_dissect.models.attention import warn_of_eager_attention
from hf_dissect.models.families import check_tokens
from hf_dissect.models.feature_encoder import find_feature_size
from hf_dissect.models.loading import check_dual_encoder, find_max_text_length, find_text_padding
from hf_dissect.selection import SampleLedger, SelectionStrategy
from hf_dissect.selection.initial_ledger import begin_with_scores
from hf_dissect.selection.planned_loading import check_loading
from hf_dissect.selection.saved_ledger import LEDGER_FILE, has_ledger
from hf_dissect.training.balanced_pairs import balance_pairs, write_weights
from hf_dissect.training.task_experts import check_tasks
from hf_dissect.training.trainer_arguments import (
    check_best_metric,
    check_grad_cache,
    check_trainable,
    check_trainer_arguments,
    refuse_search,
)
from hf_dissect.training.warm_up import count_steps, list_warm_ups, warn_if_warm_up_outlasts
from hf_dissect.training_args import DissectTrainingArguments

logger = logging.getLogger(__name__)


def check_arguments(
    args: Any, data_collator: Any, processing_class: Any, evaluation: Any, given: Mapping[str, Any], model: Any = None
) -> None:
    """Check the training arguments, and that there is a collator or a processor.

    A model that reads stored features of the captions needs no tokenizer.

    Args:
        args: Arguments of the run.
        data_collator: Collator, or None.
        processing_class: Processor, or None.
        evaluation: Evaluation data, a dict of several, or None.
        given: Further arguments of `transformers.Trainer`, by name.
        model: Model, or None; one that reads stored features of the captions needs no tokenizer.

    Raises:
        TypeError: `args` is not a `DissectTrainingArguments`.
        ValueError: There is neither a collator nor a processor with a tokenizer, or an argument cannot be used.
    """
    if not isinstance(args, DissectTrainingArguments):
        raise TypeError(f"args is {type(args).__name__}; pass hf_dissect.DissectTrainingArguments.")
    if data_collator is None and find_feature_size(model, "text") is None:
        if processing_class is None:
            raise ValueError("processing_class is missing: pass the model's processor (AutoProcessor).")
        find_tokenizer(processing_class)
    check_trainer_arguments(args, given)
    check_best_metric(args, given, RETRIEVAL_FIGURES, evaluation)


def wrap_pairs(
    argument: str,
    dataset: Any,
    args: DissectTrainingArguments,
    collator: Any = None,
    columns: Mapping[str, str | None] | None = None,
) -> Any:
    """Wrap a data set as pairs, see `as_pairs`, and collate the first of them, see `check_first_pairs`.

    Args:
        argument: Name of the trainer argument with the data set, for errors.
        dataset: Data set, a dict of several, or None.
        args: Arguments of the run, with the names of the columns.
        collator: Collator of the pairs; None to collate none.
        columns: Names of the columns, see `as_pairs`; None for those of evaluation data.

    Returns:
        Pairs, a dict of pairs, or None.

    Raises:
        ValueError: The data set does not fit the arguments.
        TooManyBadRows: None of the first pictures can be read.
    """
    if dataset is None:
        return None
    if isinstance(dataset, dict) and not hasattr(dataset, "column_names"):
        return {name: wrap_pairs(argument, part, args, collator) for name, part in dataset.items()}
    try:
        pairs = as_pairs(dataset, **(columns or args.column_names()))
    except ValueError as error:
        raise ValueError(f"{argument}: {error}") from error
    if collator is not None:
        check_first_pairs(collator, **{argument: pairs})
    return pairs


def is_checked(dataset: Any, train: Any, evaluation: Any) -> bool:
    """Return True for a data set of the trainer, or one of several, which was checked with the trainer."""
    parts = evaluation.values() if isinstance(evaluation, dict) else ()
    return any(dataset is known for known in (train, evaluation, *parts))


def wrap_evaluation_pairs(dataset: Any, model: Any, train: Any, args: DissectTrainingArguments, collator: Any) -> Any:
    """Wrap data to evaluate as pairs, see `wrap_pairs`, and check that they fit the tasks of a model.

    Args:
        dataset: Data set, a dict of several, or None; the name of one of several is returned as it is.
        model: Model, wrapped or not.
        train: Training pairs, or None.
        args: Arguments of the run.
        collator: Collator of the pairs.

    Returns:
        Pairs, a dict of pairs, a name, or None.

    Raises:
        ValueError: The data set does not fit the arguments or the model.
    """
    if isinstance(dataset, str):
        return dataset
    pairs = wrap_pairs("eval_dataset", dataset, args, collator)
    check_tasks(model, train, pairs)
    return pairs


def wrap_training_pairs(dataset: Any, args: DissectTrainingArguments) -> Any:
    """Wrap the training data as pairs, see `as_pairs`.

    Args:
        dataset: Data set, or None.
        args: Arguments of the run, with the names of the columns.

    Returns:
        Pairs, or None.

    Raises:
        ValueError: The data do not fit the arguments, are several data sets, or do not fill a batch of candidates on
            all processes.
    """
    if isinstance(dataset, dict) and not hasattr(dataset, "column_names"):
        raise ValueError(f"train_dataset holds several data sets ({', '.join(dataset)}); pass one of them.")
    pairs = wrap_pairs("train_dataset", dataset, args, columns=args.training_columns())
    if pairs is not None:
        check_weighted(pairs, args.weight_column)
        balance_pairs(pairs, args)
    count, batch = count_pairs(pairs), args.train_batch_size * args.world_size
    if count is not None and count < batch:
        raise ValueError(
            f"train_dataset has {count} pairs, fewer than one batch of {batch} candidates "
            f"(per_device_train_batch_size {args.per_device_train_batch_size} x {args.world_size} processes); lower "
            "per_device_train_batch_size."
        )
    return pairs


def prepare_data(model: Any, train: Any, evaluation: Any, args: DissectTrainingArguments) -> tuple[Any, Any]:
    """Wrap training and evaluation data as pairs, and check that the training data fit the model.

    Args:
        model: Dual encoder; None if the trainer makes it later.
        train: Training data, or None.
        evaluation: Evaluation data, a dict of several, or None.
        args: Arguments of the run.

    Returns:
        Training pairs and evaluation pairs.

    Raises:
        ValueError: The data do not fit the arguments or the model, or the model is not a dual encoder.
    """
    train, evaluation = wrap_training_pairs(train, args), wrap_pairs("eval_dataset", evaluation, args)
    if model is not None:
        check_dual_encoder(model)
        check_images_fit(model, train)
    return train, evaluation


def make_collator(model: Any, processor: Any, args: DissectTrainingArguments) -> SelectionCollator:
    """Build the collator for a model and its processor; raise a `ValueError` if it does not fit the two."""
    if args.fast_decoding and find_side(getattr(processor, "image_processor", None)) is None:
        raise ValueError(
            "fast_decoding (data.fast_decoding in a recipe) needs an image processor that resizes pictures to one "
            "size, which this model's does not; leave it out."
        )
    reads_features, text_size = find_feature_size(model, "vision") is not None, find_feature_size(model, "text")
    if text_size is not None:
        choose_caption_lengths(args.caption_lengths, 0, "features")
        return SelectionCollator(
            processor,
            reads_features=reads_features,
            text_feature_size=text_size,
            fast_decoding=args.fast_decoding,
        )
    check_tokens(model, find_tokenizer(processor))
    padding, limit = find_text_padding(model), choose_caption_length(model, processor, args)
    return SelectionCollator(
        processor,
        text_padding=padding,
        max_caption_length=limit,
        caption_lengths=choose_caption_lengths(args.caption_lengths, limit, padding, args.torch_compile),
        reads_features=reads_features,
        fast_decoding=args.fast_decoding,
    )


def choose_caption_length(model: Any, processor: Any, args: DissectTrainingArguments) -> int:
    """Choose the number of tokens after which captions are cut: `max_caption_length`, or the limit of the model.

    Raises:
        ValueError: `max_caption_length` is beyond the limit of the model.
    """
    limit = find_max_text_length(model, processor)
    if args.max_caption_length is not None and args.max_caption_length > limit:
        raise ValueError(
            f"max_caption_length={args.max_caption_length} is beyond the {limit} tokens that the model can read; "
            "lower it, or leave it out."
        )
    return args.max_caption_length or limit


def try_collator(collator: Any, train: Any, evaluation: Any) -> Any:
    """Return the collator after it has collated the first pairs, see `check_first_pairs`."""
    check_first_pairs(collator, train_dataset=train, eval_dataset=evaluation)
    return collator


def check_model(model: Any, args: DissectTrainingArguments, train: Any, evaluation: Any, uses_deepspeed: bool) -> None:
    """Check that a model is a dual encoder, and fits the arguments and the tasks of the pairs.

    Args:
        model: Model, wrapped or not.
        args: Arguments of the run.
        train: Training pairs, or None.
        evaluation: Pairs, a dict of several, or None.
        uses_deepspeed: True for a run with DeepSpeed.

    Raises:
        ValueError: The model is not a dual encoder, or does not fit.
    """
    check_grad_cache(model, args, uses_deepspeed)
    check_dual_encoder(model)
    warn_of_eager_attention(model)
    check_trainable(model, args)
    check_tasks(model, train, evaluation)
    if args.selection_rescore_every > 1 and args.selection_strategy != "none":
        check_loading(train)


def begin(pairs: Any, objective: Any, strategy: Any, args: Any, search: Any) -> None:
    """Check that there are data and no search, warn if the run ends before a warm-up does, and begin the strategy.

    The sampling file of a balance is written to the run folder.

    Args:
        pairs: Training pairs, or None.
        objective: Objective of the run.
        strategy: Strategy of the run.
        args: Arguments of the run.
        search: Backend of a hyper-parameter search, or None.

    Raises:
        ValueError: There are no data, or there is a search.
    """
    if pairs is None:
        raise ValueError("train_dataset is missing: pass it to DissectTrainer.")
    refuse_search(search)
    warn_if_warm_up_outlasts(pairs, list_warm_ups(strategy, objective), args)
    write_weights(pairs, args)
    strategy.begin_run(count_steps(count_pairs(pairs), args))


def load_ledger(ledger: SampleLedger, folder: str, has_state: bool) -> None:
    """Load the ledger of a checkpoint, and warn if the checkpoint has no ledger, or no state of the selection."""
    if has_ledger(folder):
        ledger.load(Path(folder, LEDGER_FILE))
    else:
        logger.warning("%s has no %s: the history of the pairs begins again.", folder, LEDGER_FILE)
    if not has_state:
        logger.warning("%s has no state of the selection: its figures and logs begin again.", folder)


def begin_with_initial_ledger(
    ledger: SampleLedger, strategy: SelectionStrategy, pairs: Any, args: DissectTrainingArguments
) -> None:
    """Fill the ledger with the scores that `args.initial_ledger` names; every rank calls this function.

    Raises:
        FileNotFoundError: There are no scores.
        HubError: The Hub does not have the scores, or cannot be reached.
        ValueError: The scores belong to other data.
    """
    source = str(args.initial_ledger)
    with args.main_process_first(local=True, desc="reading the initial ledger"):
        scores = read_shared_scores(source)
    begin_with_scores(ledger, scores, strategy, source, getattr(pairs, "sample_ids", None))


def count_pairs(pairs: Any) -> int | None:
    """Return the number of pairs; None for a stream."""
    return len(pairs) if hasattr(pairs, "__len__") else None
