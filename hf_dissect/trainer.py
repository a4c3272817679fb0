"""The Hugging Face Trainer with one addition: of each candidate batch, only the pairs worth a gradient train."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import TrainOutput

from hf_dissect import training_data
from hf_dissect.data.bad_rows import BadRows
from hf_dissect.data.model_inputs import forward_inputs
from hf_dissect.data.pair_keys import OPTIONAL_ROW_KEYS, ROW_KEYS
from hf_dissect.data.pair_sample import sample_pairs
from hf_dissect.data.pairs import PairStream
from hf_dissect.data.streaming.loader import StreamLoader
from hf_dissect.evaluation.pair_encoder import PairEncoder
from hf_dissect.evaluation.pair_scores import join_correlations, score_batches
from hf_dissect.evaluation.predictions import compute_retrieval, predict_pairs
from hf_dissect.model_card import SelectionCard, tag_model
from hf_dissect.models.loading import find_loss_kind, list_networks, logit_scale_and_bias, restore_weights
from hf_dissect.objective import Objective
from hf_dissect.selection import CandidateScores, LoopHooks, OnlineSelector, SelectionStrategy
from hf_dissect.selection.reference.loading import load_reference
from hf_dissect.selection.selector import Batch
from hf_dissect.selection.trace import SelectionTrace
from hf_dissect.summary import SelectionSummary
from hf_dissect.training.candidate_loaders import make_pair_loader, make_stream_loader
from hf_dissect.training.chunked_step import step_in_chunks
from hf_dissect.training.loading_files import write_loading_files
from hf_dissect.training.non_finite import check_finite
from hf_dissect.training.reference_pass import ReferencePass
from hf_dissect.training.reload_check import make_callbacks
from hf_dissect.training.resolution import Resolution
from hf_dissect.training.run_folder import drop_speed
from hf_dissect.training.run_state import Part
from hf_dissect.training.trainer import BaseTrainer
from hf_dissect.training_args import DissectTrainingArguments


class DissectTrainer(BaseTrainer):
    """Trainer of a CLIP-like dual encoder on the pairs that a selection strategy keeps.

    Args:
        model: Model with `get_image_features` and `get_text_features`.
        args: Arguments of the run; None for the defaults.
        data_collator: Collator of the pairs; None for a `SelectionCollator`.
        train_dataset: Data set with columns for image and caption, or the pairs of `hf_dissect.data.as_pairs`.
        eval_dataset: Data set of the same kind, or a dict of several.
        processing_class: Processor of the model, which is saved with it.
        strategy: Strategy of the run; None for the one that `args` names.
        recipe: `Recipe` of the run, which is saved with it; None without one.
        reference_model: Reference of the strategy, frozen here; None for the one that `args` names.
        trainer_arguments: Further arguments of `transformers.Trainer`.

    Attributes:
        selector: `OnlineSelector` that keeps the pairs; `strategy`, `ledger`, `monitor` and `bad_rows` are its parts.
        objective: `Objective`, the loss of the kept pairs.

    Raises:
        TypeError: `args` is not a `DissectTrainingArguments`.
        ValueError: Processor, data or model are missing or do not fit each other.
    """

    args: DissectTrainingArguments
    objective: Objective
    summary: SelectionSummary
    card_callback = SelectionCard
    timed_parts = ("data", "scoring", "training", "evaluation")
    strategy = property(attrgetter("selector.strategy"))
    ledger = property(attrgetter("selector.ledger"))
    monitor = property(attrgetter("selector.monitor"))
    bad_rows = property(attrgetter("selector.bad_rows"))

    def __init__(
        self,
        model: nn.Module | None = None,
        args: DissectTrainingArguments | None = None,
        data_collator: Callable | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        strategy: SelectionStrategy | None = None,
        recipe: Any = None,
        reference_model: nn.Module | None = None,
        **trainer_arguments: Any,
    ) -> None:
        args = args or DissectTrainingArguments("runs/dissect")
        training_data.check_arguments(args, data_collator, processing_class, eval_dataset, trainer_arguments, model)
        train_dataset, eval_dataset = training_data.prepare_data(model, train_dataset, eval_dataset, args)
        trainer_arguments.setdefault("compute_metrics", compute_retrieval)
        super().__init__(
            model,
            args,
            recipe=recipe,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **trainer_arguments,
        )
        training_data.check_model(self.model, args, train_dataset, eval_dataset, self.is_deepspeed_enabled)
        tag_model(self.model)
        collator = data_collator or training_data.make_collator(self.model, processing_class, args)
        self.data_collator = training_data.try_collator(collator, train_dataset, eval_dataset)
        self.kind, self.encoder = find_loss_kind(self.model), PairEncoder()
        self.objective = args.make_objective(self.kind, len(list_networks(self.model)), self.model, self.data_collator)
        self.selector = self._make_selector(args.make_strategy(strategy), reference_model)
        self.resolution = Resolution(args, self.model, self.data_collator, self.selector)
        self.stream: StreamLoader | None = None  # during training on a stream
        self._stream_batches: Iterator[Batch] | None = None
        self.summary = SelectionSummary(self.selector, self.objective, train_dataset, recipe, args, eval_dataset)
        self.parts["selection"] = Part(self.selector)
        self.parts["bad_rows"] = Part(self.bad_rows, each_rank=True, join=BadRows.join_states)
        self.parts["objective"] = Part(self.objective)
        self.parts["decorrelation"] = Part(self.objective.decorrelation, each_rank=True)
        callbacks = self.resolution, ReferencePass(self.selector, self.stop_request)
        for callback in (*make_callbacks(self.data_collator, self.train_dataset), *callbacks):
            self.add_callback(callback)

    def _make_selector(self, strategy: SelectionStrategy, reference: nn.Module | None) -> OnlineSelector:
        args, pairs, autocast = self.args, self.train_dataset, self.accelerator.autocast
        parts = self.model, args, pairs, self.data_collator, training_data.make_collator
        return OnlineSelector(
            strategy,
            reference=load_reference(strategy, reference, *parts),
            **args.selector_settings(),
            num_samples=getattr(pairs, "num_samples", None),
            columns=self.objective.columns,
            kind=self.kind,
            padding=getattr(self.data_collator, "padding", {}),
            ranks=self.ranks,
            bad_rows=BadRows(args.max_bad_fraction, training_data.count_pairs(pairs)),
            trace=SelectionTrace(args.output_dir if args.record_selection and self.is_world_process_zero() else None),
            hooks=LoopHooks(self._agree, self._prepare_inputs, autocast, self.times.measure, self._check_finite),
        )

    # ---- the path of a pair: collated -> scored -> selected -> loss ----

    def get_train_dataloader(self) -> DataLoader:
        """Return the loader of the Trainer, or for a stream, a loader whose position can be saved."""
        pairs: Any = self.train_dataset
        if not isinstance(pairs, PairStream):
            loading = pairs, self.args, self._get_dataloader, self._train_batch_size, self._get_train_sampler
            return make_pair_loader(self.selector, self.resolution, *loading)
        self.stream = make_stream_loader(self.selector, self.resolution, pairs, self.args)
        self._stream_batches = iter(self.stream)
        self.parts["stream"] = Part(self.stream, each_rank=True, join=lambda states, own: states[own % len(states)])
        return cast(DataLoader, self.stream)  # the Trainer only iterates over it

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Batch], Any]:
        """Read the candidate batches of an update, and keep the pairs of each that the strategy selects."""
        if self.state.global_step >= self.state.max_steps:
            return [], None  # a finished run that is resumed
        batches = epoch_iterator if self._stream_batches is None else self._stream_batches
        with self.times.measure("data"):
            candidates, num_items = super().get_batch_samples(batches, num_batches, device)
        self.objective.begin_step(self.state.global_step / self.state.max_steps, self.strategy)
        return [
            self.selector.select(self.model_wrapped, batch, step=self.state.global_step, micro_step=number)
            for number, batch in enumerate(candidates)
        ], num_items

    def _agree(self, num_good: int) -> list[int]:
        """Exchange the state of the ranks before a selection, and return the number of candidates of each rank."""
        passes = 0 if self.stream is None else self.stream.passes
        sizes, all_passes, stops = self.ranks.gather_numbers(num_good, passes, self.stop_request.made).T.tolist()
        self.stop_request.grant_if(any(stops))
        if self.stream is not None and min(all_passes) > self.selector.epoch:
            self.enter_epoch(min(all_passes))
        return sizes

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Compute the loss of the objective over the kept pairs of all ranks, with the weights of the strategy."""
        outputs = model(**forward_inputs(model, inputs))
        loss = self._compute_loss(model, inputs, outputs, *logit_scale_and_bias(model))
        return (loss, outputs) if return_outputs else loss

    def _compute_loss(
        self, model: nn.Module, inputs: Batch, outputs: Batch, scale: Any, bias: Any, projections: Any = None
    ) -> torch.Tensor:
        loss = self.objective.compute_loss(model, inputs, outputs, scale, bias, self.ledger, projections)
        if model.training:
            evidence = self.objective.compute_evidence(outputs, inputs["sample_id"], self.ledger)
            self.selector.record_training(inputs["sample_id"], outputs, evidence, self.objective.robust)
        return loss

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Any = None) -> torch.Tensor:
        """Compute loss and gradients of a step, and stop before the weights change if the loss is not finite."""
        if len(inputs["sample_id"]) == 0:
            return torch.zeros((), device=self.args.device)
        chunk_size = self.args.grad_cache_chunk_size
        self.selector.fetch(inputs["sample_id"] if self.objective.reads_ledger else None)
        if chunk_size is None or len(inputs["sample_id"]) <= chunk_size:
            loss = super().training_step(model, inputs, num_items_in_batch)
        else:
            loss = step_in_chunks(
                model,
                self._prepare_inputs(inputs),
                self._compute_loss,
                chunk_size=chunk_size,
                optimizer=self.optimizer,
                accelerator=self.accelerator,
                num_micro_batches=self.current_gradient_accumulation_steps,
                autocast=self.compute_loss_context_manager,
            )
        self._check_finite(loss, "the loss", inputs["sample_id"])
        self.selector.finish_step(model)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the figures of selection and decorrelation to the logs of training."""
        if "loss" in logs:
            logs.update(self.summary.pop_logs(self.times) | self.resolution.describe())
        super().log(logs, start_time)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Return the loader of data to evaluate or to predict, with all rows."""
        if not training_data.is_checked(eval_dataset, self.train_dataset, self.eval_dataset):
            parts = self.model, self.train_dataset, self.args, self.data_collator
            eval_dataset = training_data.wrap_evaluation_pairs(eval_dataset, *parts)
        return super().get_eval_dataloader(eval_dataset)

    get_test_dataloader = get_eval_dataloader  # type: ignore[assignment]  # another name of the argument

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Compute loss, recall at 1, 5 and 10, and median rank in both directions on `eval_dataset`."""
        with self.times.measure("evaluation"), self.encoder.remember():
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def prediction_step(
        self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple:
        """Return loss, predictions and labels of a batch of `B` pairs, see `predict_pairs`."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = self.encoder(model, inputs)
        prediction = predict_pairs(outputs, inputs, self.objective.contrastive_loss)
        return (prediction[0], None, None) if prediction_loss_only else prediction

    def score_pairs(self, dataset: Any) -> dict[str, torch.Tensor]:
        """Compute the correlation of all readable pairs under the current weights, see `join_correlations`."""
        batches = self.get_eval_dataloader(dataset)
        return join_correlations(self.score_batches(batches), self.accelerator.gather_for_metrics)

    def score_batches(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, CandidateScores]]:
        """Yield each batch on the device of the model, with its scores under the current weights."""
        steps: Any = {"prepare": self._prepare_inputs, "autocast": self.accelerator.autocast, "kind": self.kind}
        return score_batches(self.model, batches, shown=not self.args.disable_tqdm, **steps)

    # ---- the run ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as `BaseTrainer.train`, from the scores of `initial_ledger` unless the run is resumed."""
        training_data.begin(self.train_dataset, self.objective, self.strategy, self.args, self.hp_search_backend)
        if self.args.initial_ledger is not None and not resume_from_checkpoint:
            training_data.begin_with_initial_ledger(self.ledger, self.strategy, self.train_dataset, self.args)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _train(self, checkpoint: str | None, *args: Any, **kwargs: Any) -> TrainOutput:
        try:
            output = super()._train(checkpoint, *args, **kwargs)
        finally:
            self.stream = self._stream_batches = None  # ends its workers
            self.parts.pop("stream", None)
        self.selector.trace.close(self.ranks)
        return output

    def begin_epoch(self, epoch: float) -> None:
        """Enter an epoch of map-style data; for a stream, `_agree` enters a new epoch with each pass."""
        if self.stream is None:
            is_counted = training_data.count_pairs(self.train_dataset) is None
            self.enter_epoch(self.selector.epoch + 1 if is_counted else int(epoch + 1e-6))

    def enter_epoch(self, epoch: int) -> None:
        """Begin or continue an epoch of selector and objective."""
        self.selector.begin_epoch(epoch, renew=self.objective.update)
        self.objective.on_epoch_begin(epoch)

    def reset(self, step: int) -> None:
        """Count epochs from the beginning, and discard the record of selections from `step` on."""
        self.selector.reset(step)

    def save_extra(self, folder: Path) -> None:
        """Write the recipe, and what loading needs next to the weights."""
        super().save_extra(folder)
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        write_loading_files(folder, self.model, self.processing_class, self.train_dataset, is_sharded=is_sharded)

    def _save_weights(self, folder: Path, *arguments: Any) -> None:
        self.selector.save_ledger(folder, is_first=self.args.should_save)  # of each process, unlike `save_extra`
        super()._save_weights(folder, *arguments)

    def restore_extra(self, folder: str, has_state: bool) -> None:
        """Load the ledger and continue the epoch."""
        training_data.load_ledger(self.ledger, folder, has_state)
        if has_state:
            self.enter_epoch(self.selector.epoch)
            # The epoch of an iterable data set begins again, which counts it once more.
            self.selector.epoch -= training_data.count_pairs(self.train_dataset) is None and self.stream is None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load = partial(super()._load_from_checkpoint, resume_from_checkpoint, model)
        restore_weights(self.model, resume_from_checkpoint, load)

    def _load_best_model(self) -> None:
        restore_weights(self.model, str(self.state.best_model_checkpoint), super()._load_best_model)

    def compute_figures(
        self, test_dataset: Any, more_figures: Any = None, retrieval: bool = True, noise_detection: bool = True
    ) -> Iterator[dict[str, Any]]:
        """Yield the final figures by name, part by part; every rank calls this method.

        Args:
            test_dataset: Data of the retrieval figures; None for `eval_dataset`.
            more_figures: Function that returns further figures by name; None for no others.
            retrieval: True to compute the retrieval figures.
            noise_detection: True to score the training pairs, at most `max_train_pairs`, if their truth is known.
        """
        self.selector.join_saved_ledger(self.args.output_dir)
        dataset, unlogged = self.summary.choose_evaluated(test_dataset, self.eval_dataset), {}
        if retrieval and dataset is not None:
            yield drop_speed(self.evaluate(dataset, metric_key_prefix="test"), "test")
        if more_figures is not None:
            yield (unlogged := more_figures())
        if noise_detection and getattr(self.train_dataset, "knows_truth", False):
            with self.times.measure("evaluation"):
                scored = self.score_pairs(sample_pairs(self.train_dataset, self.args.max_train_pairs))
            yield (noise := self.summary.evaluate_noise(scored))
            unlogged = {**unlogged, **noise}
        with self.times.measure("evaluation"):
            self.summary.measure_router(self.model, self.get_eval_dataloader, self._prepare_inputs, self.accelerator)
        if unlogged:
            self.log({f"test_{key}": float(value) for key, value in unlogged.items() if value is not None})

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        names: list[str] = [*(self._signature_columns or ()), *ROW_KEYS, *OPTIONAL_ROW_KEYS]
        self._signature_columns = list(dict.fromkeys(names))  # type: ignore[assignment]  # transformers declares None

    def _check_finite(self, values: torch.Tensor, name: str, sample_id: torch.Tensor) -> None:
        check_finite(values, name, sample_id, self.state.global_step, self.args.output_dir)
