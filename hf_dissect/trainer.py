"""The Hugging Face Trainer with one thing added: of each candidate batch, only the pairs worth a gradient train."""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import TrainOutput

from hf_dissect.data.bad_rows import BadRows
from hf_dissect.data.model_inputs import forward_inputs
from hf_dissect.data.pairs import ROW_KEYS, PairStream
from hf_dissect.data.streaming.loader import StreamLoader
from hf_dissect.data.tasks import save_task_names
from hf_dissect.evaluation.pair_scores import Batch, join_correlations, score_batches
from hf_dissect.evaluation.predictions import predict_pairs, retrieval_of_predictions
from hf_dissect.losses import grad_cached_backward
from hf_dissect.model_card import SelectionCard, tag_model
from hf_dissect.models.adapters import restore_base, save_base
from hf_dissect.models.loading import contrastive_kind, logit_scale_and_bias, networks_of
from hf_dissect.models.tasks import representations
from hf_dissect.selection import CandidateScores, LoopHooks, OnlineSelector, SelectionStrategy
from hf_dissect.selection.ledger import LEDGER_FILE
from hf_dissect.selection.trace import SelectionTrace
from hf_dissect.summary import SelectionSummary
from hf_dissect.training.clamp_logit_scale import ClampLogitScale
from hf_dissect.training.non_finite import check_finite
from hf_dissect.training.run_folder import without_speed
from hf_dissect.training.run_state import Part
from hf_dissect.training.trainer import BaseTrainer
from hf_dissect.training_args import DissectTrainingArguments
from hf_dissect.training_data import (
    begin_with_initial_ledger,
    check_arguments,
    check_model,
    check_tasks,
    list_warm_ups,
    load_ledger,
    make_collator,
    num_pairs,
    pairs_for,
    prepare_data,
    stream_loader,
    warn_if_warm_up_outlasts,
)


class DissectTrainer(BaseTrainer):
    """Trainer of a CLIP-like dual encoder on the pairs that its selection strategy keeps.

    Args:
        model: Model with `get_image_features` and `get_text_features`.
        args: `DissectTrainingArguments`.
        data_collator: Collator of the pairs; by default a `SelectionCollator` for the model and the processor.
        train_dataset: Data set with an image and a caption column, or of what `hf_dissect.data.as_pairs` returns.
        eval_dataset: Data set of the same kind, or a dict of several.
        processing_class: Processor of the model; saved with it.
        strategy: `SelectionStrategy` instead of the one that `args` names.
        recipe: `Recipe` of the run, saved with it.
        trainer_arguments: Further arguments of `transformers.Trainer`.

    Attributes:
        selector: `OnlineSelector` that keeps the pairs; `strategy`, `ledger`, `monitor` and `bad_rows` are its parts.
        objective: `Objective` that the kept pairs are trained by.

    Raises:
        TypeError: `args` is not a `DissectTrainingArguments`.
        ValueError: processor, data or model are missing or do not go together.
    """

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
        **trainer_arguments: Any,
    ):
        args = DissectTrainingArguments("runs/dissect") if args is None else args
        check_arguments(args, data_collator, processing_class)
        train_dataset, eval_dataset = prepare_data(model, train_dataset, eval_dataset, args)
        trainer_arguments.setdefault("compute_metrics", retrieval_of_predictions)
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
        check_model(self.model, args, train_dataset, eval_dataset, self.is_deepspeed_enabled)
        tag_model(self.model)
        if data_collator is None:
            self.data_collator = make_collator(self.model, processing_class, args)
        self.kind = contrastive_kind(self.model)
        self.objective = args.make_objective(self.kind, num_networks=len(networks_of(self.model)))
        self.selector = self._make_selector(args.make_strategy() if strategy is None else strategy)
        self.stream: StreamLoader | None = None  # while the training data are a stream
        self._stream_batches: Iterator[Batch] | None = None
        self.summary = SelectionSummary(self.selector, train_dataset, recipe, args)
        self.parts["selection"] = Part(self.selector)
        self.parts["bad_rows"] = Part(self.bad_rows, each_rank=True, join=BadRows.join_states)
        self.parts["decorrelation"] = Part(self.objective.decorrelation, each_rank=True)
        self.add_callback(ClampLogitScale())

    def _make_selector(self, strategy: SelectionStrategy) -> OnlineSelector:
        args, pairs, autocast = self.args, self.train_dataset, self.accelerator.autocast
        records = args.record_selection and self.is_world_process_zero()
        return OnlineSelector(
            strategy,
            **args.selector_settings(),
            num_samples=getattr(pairs, "num_samples", None),
            columns=self.objective.columns,
            kind=self.kind,
            padding=getattr(self.data_collator, "padding", {}),
            ranks=self.ranks,
            bad_rows=BadRows(args.max_bad_fraction, num_pairs(pairs)),
            trace=SelectionTrace(args.output_dir if records else None),
            hooks=LoopHooks(self._agree, self._prepare_inputs, autocast, self.times.measure, self._check_finite),
        )

    # ---- the way of a pair: collated -> scored -> selected -> loss ----

    def get_train_dataloader(self) -> DataLoader:
        """Return the Trainer's loader; for a stream, one whose position can be saved and restored."""
        if not isinstance(self.train_dataset, PairStream):
            return super().get_train_dataloader()
        self.stream = stream_loader(self.train_dataset, self.data_collator, self.args)
        self._stream_batches = iter(self.stream)
        self.parts["stream"] = Part(self.stream, each_rank=True, join=lambda states, own: states[own % len(states)])
        return self.stream

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Batch], Any]:
        """Pull the candidate batches of one update and keep of each what the strategy selects."""
        if self.state.global_step >= self.state.max_steps:
            return [], None  # a finished run that is resumed
        batches = self._stream_batches if self.stream is not None else epoch_iterator
        with self.times.measure("data"):
            candidates, num_items = super().get_batch_samples(batches, num_batches, device)
        return [
            self.selector.select(self.model_wrapped, batch, step=self.state.global_step, micro_step=number)
            for number, batch in enumerate(candidates)
        ], num_items

    def _agree(self, num_good: int) -> list[int]:
        """Exchange what all ranks have to know before a selection; return how many candidates each of them has."""
        passes = 0 if self.stream is None else self.stream.passes
        sizes, all_passes, stops = self.ranks.table(num_good, passes, self.stop_request.made).T.tolist()
        self.stop_request.grant_if(any(stops))
        if self.stream is not None and min(all_passes) > self.selector.epoch:
            self.enter_epoch(min(all_passes))
        return sizes

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Return the loss of the objective over the kept pairs of all ranks, weighted as the strategy asks."""
        outputs = model(**forward_inputs(model, inputs))
        loss = self._loss(model, inputs, outputs, *logit_scale_and_bias(model))
        return (loss, outputs) if return_outputs else loss

    def _loss(
        self, model: nn.Module, inputs: Batch, outputs: Batch, *scale_and_bias: torch.Tensor, projections: Any = None
    ) -> torch.Tensor:
        loss = self.objective.loss(model, inputs, outputs, *scale_and_bias, self.ledger, projections)
        if model.training:
            evidence = self.objective.evidence(outputs, inputs["sample_id"], self.ledger)
            recorded = self.selector.record_training(inputs["sample_id"], outputs, evidence)
            if recorded:
                self.objective.record(recorded["sample_id"], recorded, self.ledger)
        return loss

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Any = None) -> torch.Tensor:
        """Make the Trainer's step; stop before the weights are touched when the loss is not finite."""
        if len(inputs["sample_id"]) == 0:
            return torch.zeros((), device=self.args.device)
        if len(inputs["sample_id"]) <= (self.args.grad_cache_chunk_size or math.inf):
            loss = super().training_step(model, inputs, num_items_in_batch)
        else:
            loss = self._training_step_in_chunks(model, inputs)
        self._check_finite(loss, "the loss", inputs["sample_id"])
        return loss

    def _training_step_in_chunks(self, model: nn.Module, inputs: Batch) -> torch.Tensor:
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        inputs = self._prepare_inputs(inputs)
        share = 1 / self.current_gradient_accumulation_steps
        loss = grad_cached_backward(
            model,
            forward_inputs(model, inputs),
            lambda cached, *scale: self._loss(model, inputs, cached, *scale, projections=cached["projections"]),
            chunk_size=self.args.grad_cache_chunk_size,
            backward=lambda part: self.accelerator.backward(part * share),
            no_sync=partial(self.accelerator.no_sync, model),
            autocast=self.compute_loss_context_manager,
            representations=partial(representations, model),
        )
        return loss * share

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the figures of the selection to the training logs."""
        if "loss" in logs:
            logs.update(self.selector.pop_logs())
            logs.update(self.objective.decorrelation.pop_logs())
            if self.times["scoring"]:
                logs["selection_scoring_time_share"] = self.times["scoring"] / self.times.total
        super().log(logs, start_time)

    # ---- evaluation ----

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return loss and retrieval (recall at 1, 5, 10 and median rank in both directions) on `eval_dataset`."""
        if not isinstance(eval_dataset, str):
            eval_dataset = pairs_for("eval_dataset", eval_dataset, self.args)
            check_tasks(self.model, self.train_dataset, eval_dataset)
        with self.times.measure("evaluation"):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def prediction_step(
        self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple:
        """Return the loss of the batch's good pairs, the embeddings `(B, D)` of both sides, and the pairs' keys."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**forward_inputs(model, inputs))
        prediction = predict_pairs(outputs, inputs, kind=self.kind)
        return (prediction[0], None, None) if prediction_loss_only else prediction

    def score_pairs(self, dataset: Any) -> dict[str, torch.Tensor]:
        """Return the correlation of every readable pair under the current weights, see `join_correlations`."""
        pairs = pairs_for("dataset", dataset, self.args)
        check_tasks(self.model, self.train_dataset, pairs)
        scored = self.score_batches(self.get_eval_dataloader(pairs))
        return join_correlations(scored, self.accelerator.gather_for_metrics)

    def score_batches(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, CandidateScores]]:
        """Yield each batch of an evaluation loader on the device, with the scores under the current weights."""
        autocast = self.accelerator.autocast
        return score_batches(self.model, batches, kind=self.kind, prepare=self._prepare_inputs, autocast=autocast)

    # ---- the run ----

    def train(self, resume_from_checkpoint: str | bool | None = None, **arguments: Any) -> TrainOutput:
        """Train as `BaseTrainer` does; a run that is not resumed may begin with the ledger of another one."""
        if self.train_dataset is None:
            raise ValueError("train_dataset is missing: pass it to DissectTrainer.")
        warn_if_warm_up_outlasts(self.train_dataset, list_warm_ups(self.strategy, self.objective), self.args)
        if self.args.initial_ledger is not None and not resume_from_checkpoint:
            begin_with_initial_ledger(self.ledger, self.strategy, self.train_dataset, self.args)
        return super().train(resume_from_checkpoint, **arguments)

    def _train(self, checkpoint: str | None, **arguments: Any) -> TrainOutput:
        try:
            output = super()._train(checkpoint, **arguments)
        finally:
            self.stream = self._stream_batches = None  # its workers end
            self.parts.pop("stream", None)
        self.selector.trace.close()
        return output

    def begin_epoch(self, epoch: float) -> None:
        """Enter the epoch. The Trainer sees one epoch of a stream; there, the loader reports passes (`_agree`)."""
        if self.stream is None:
            is_counted = num_pairs(self.train_dataset) is None
            self.enter_epoch(self.selector.epoch + 1 if is_counted else int(epoch + 1e-6))

    def enter_epoch(self, epoch: int) -> None:
        """Begin an epoch of selector and objective, or continue in its middle."""
        self.selector.begin_epoch(epoch, renew=self.objective.update)
        self.objective.on_epoch_begin(epoch)

    def reset(self, step: int) -> None:
        """Count epochs from the beginning, and discard the record of candidates from `step` on."""
        self.selector.reset(step)

    def save_extra(self, folder: Path) -> None:
        """Write the ledger, the recipe, and what an adapter needs to be loaded."""
        self.ledger.save(folder / LEDGER_FILE, {"epoch": self.selector.epoch, "strategy": self.strategy.name})
        super().save_extra(folder)
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):  # whose processes each hold a part only
            save_base(self.model, folder)
        save_task_names(self.train_dataset, folder)

    def restore_extra(self, folder: str, has_state: bool) -> None:
        """Load the ledger and continue the epoch."""
        load_ledger(self.ledger, folder, has_state)
        if has_state:
            self.enter_epoch(self.selector.epoch)
            # Epochs of a foreign stream are counted as they begin, and this one begins again.
            self.selector.epoch -= num_pairs(self.train_dataset) is None and self.stream is None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        restore_base(self.model, resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        restore_base(self.model, self.state.best_model_checkpoint)
        super()._load_best_model()

    def final_figures(
        self,
        test_dataset: Any,
        more_figures: Callable[[], dict[str, float]] | None = None,
        retrieval: bool = True,
        noise_detection: bool = True,
    ) -> dict[str, Any]:
        """Evaluate the trained model on `test_dataset` (None for `eval_dataset`), and add the `more_figures`.

        With `noise_detection`, all training pairs are scored with the final model, where the truth is known.
        """
        unlogged = {} if more_figures is None else more_figures()
        dataset, final = self.eval_dataset if test_dataset is None else test_dataset, {}
        if retrieval and dataset is not None:
            final = without_speed(self.evaluate(dataset, metric_key_prefix="test"), "test")
        if noise_detection and getattr(self.train_dataset, "knows_truth", False):
            with self.times.measure("evaluation"):
                scored = self.score_pairs(self.train_dataset)
            unlogged = unlogged | self.summary.evaluate_noise(scored)
        if unlogged:
            self.log({f"test_{key}": float(value) for key, value in unlogged.items()})
        return final | unlogged

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, *ROW_KEYS, "task_id", "is_clean"]))

    def _check_finite(self, values: torch.Tensor, name: str, sample_id: torch.Tensor) -> None:
        check_finite(values, name, sample_id, self.state.global_step, self.args.output_dir)
