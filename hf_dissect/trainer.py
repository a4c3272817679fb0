"""The Hugging Face Trainer with one thing added: of each candidate batch, only the pairs worth a gradient train."""

import math
from collections.abc import Mapping
from functools import partial

import torch
from transformers import TrainerCallback

from hf_dissect.data.bad_rows import BadRows
from hf_dissect.data.model_inputs import forward_inputs
from hf_dissect.data.pairs import ROW_KEYS, PairStream, key_hash
from hf_dissect.data_collator import SelectionCollator, find_tokenizer
from hf_dissect.distributed import Ranks
from hf_dissect.evaluating_trainer import EvaluatingTrainer
from hf_dissect.hub.publisher import PublishingTrainer
from hf_dissect.losses import grad_cached_backward
from hf_dissect.model_card import TAGS
from hf_dissect.models.loading import (
    bare_model,
    check_dual_encoder,
    clamp_logit_scale_,
    contrastive_kind,
    logit_scale_and_bias,
    networks_of,
    text_padding,
)
from hf_dissect.models.tasks import representations
from hf_dissect.objective import Objective
from hf_dissect.resumable_trainer import ResumableTrainer
from hf_dissect.selection import CandidateScores, SampleLedger, SelectionStrategy, correlation_of, score
from hf_dissect.selection.initial_ledger import begin_with_ledger
from hf_dissect.selection.scope import Kept, select_among_all, select_among_own, share_out, told_to_all
from hf_dissect.selection.trace import SelectionTrace
from hf_dissect.training.card_callback import CardedTrainer
from hf_dissect.training.non_finite import NonFiniteLossError, check_finite
from hf_dissect.training.run_folder import write_run_folder
from hf_dissect.training.time_spent import TimeSpent
from hf_dissect.training_args import DissectTrainingArguments
from hf_dissect.training_data import (
    caption_length,
    check_grad_cache,
    check_images_fit,
    check_tasks,
    num_pairs,
    pairs_for,
    stream_loader,
    training_pairs,
    warn_if_warm_up_outlasts,
)

__all__ = ["DissectTrainer", "NonFiniteLossError"]


class DissectTrainer(ResumableTrainer, PublishingTrainer, EvaluatingTrainer, CardedTrainer):
    """Trains a CLIP-like dual encoder on the pairs that its selection strategy keeps.

    Args:
        model: any model with `get_image_features` and `get_text_features`.
        args: `DissectTrainingArguments`.
        data_collator: by default a `SelectionCollator` for the model and processor.
        train_dataset, eval_dataset: a `datasets.Dataset` or `IterableDataset` with an image and a caption column (see
            `DissectTrainingArguments`), or a torch data set of dicts with `image`, `caption` and `sample_id`.
        processing_class: the model's processor; saved with the model.
        strategy: a `SelectionStrategy` of your own, instead of the one `args` names.
        recipe: the `Recipe` of the run, saved with it.
        trainer_arguments: anything else `transformers.Trainer` takes.

    Attributes:
        ledger: `SampleLedger` with the last correlation of each pair and the columns of strategy and objective.
        strategy: the `SelectionStrategy` in use.
        objective: the `Objective` in use.

    Raises:
        TypeError: `args` are no `DissectTrainingArguments`.
        ValueError: no processor, no data, fewer pairs than one batch, missing columns, bad ids, or a model that is no
            dual encoder or does not go with the objective.
    """

    # The loss is the mean over a micro-batch, to be divided by the number of accumulation steps.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model=None,
        args: DissectTrainingArguments | None = None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        strategy: SelectionStrategy | None = None,
        recipe=None,
        **trainer_arguments,
    ):
        args = DissectTrainingArguments("runs/dissect") if args is None else args
        if not isinstance(args, DissectTrainingArguments):
            raise TypeError(f"args is {type(args).__name__}; pass hf_dissect.DissectTrainingArguments.")
        if processing_class is None and data_collator is None:
            raise ValueError("processing_class is missing: pass the model's processor (AutoProcessor).")
        if data_collator is None:
            find_tokenizer(processing_class)
        train_dataset = training_pairs(train_dataset, args)
        eval_dataset = pairs_for("eval_dataset", eval_dataset, args)
        if model is not None:
            check_dual_encoder(model)
            check_images_fit(model, train_dataset)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **trainer_arguments,
        )
        check_grad_cache(self.model, args, self.is_deepspeed_enabled)
        check_dual_encoder(self.model)
        check_tasks(self.model, train_dataset, eval_dataset)
        if hasattr(bare_model(self.model), "add_model_tags"):
            bare_model(self.model).add_model_tags(list(TAGS))  # in whatever card is written for it
        if data_collator is None:
            self.data_collator = SelectionCollator(
                processing_class,
                text_padding=text_padding(self.model),
                max_caption_length=caption_length(self.model, processing_class, args),
            )
        self.recipe = recipe
        self.kind = contrastive_kind(self.model)
        self.objective = Objective(
            self.kind, args.mask_false_negatives, args.make_gsc(), num_networks=len(networks_of(self.model))
        )
        self.strategy = args.make_strategy() if strategy is None else strategy
        columns = dict.fromkeys(("correlation", *self.strategy.columns, *self.objective.columns))
        self.ledger = SampleLedger(getattr(train_dataset, "num_samples", None), columns=tuple(columns))
        self.bad_rows = BadRows(args.max_bad_fraction, num_pairs(train_dataset))
        self.ranks = Ranks(self.accelerator)
        self.trace = SelectionTrace(
            args.output_dir, records=args.record_selection, is_first_rank=self.is_world_process_zero()
        )
        self.monitor = self.trace.monitor
        self._stream_batches = None
        self.times = TimeSpent()
        self.add_callback(_SelectionCallback(self))

    # ---- the way of a pair: collated -> scored -> selected -> loss ----

    def get_train_dataloader(self):
        """The Trainer's; of a stream one whose place can be saved and found again."""
        if not isinstance(self.train_dataset, PairStream):
            return super().get_train_dataloader()
        self.stream = stream_loader(self.train_dataset, self.data_collator, self.args)
        self._stream_batches = iter(self.stream)
        return self.stream

    def get_batch_samples(self, epoch_iterator, num_batches: int, device):
        """Pull the candidate batches of one update and keep of each what its strategy selects."""
        if self.state.global_step >= self.state.max_steps:
            return [], None  # a finished run that is resumed
        batches = self._stream_batches if self.stream is not None else epoch_iterator
        with self.times.measure("data"):
            candidates, num_items = super().get_batch_samples(batches, num_batches, device)
        return [self._select(batch, micro_step) for micro_step, batch in enumerate(candidates)], num_items

    def _select(self, batch: Mapping[str, torch.Tensor], micro_step: int) -> dict[str, torch.Tensor]:
        sample_id = batch["sample_id"].cpu()
        good = self.bad_rows.add(sample_id, batch.get("bad_reason", torch.zeros_like(sample_id)).cpu())
        sizes = self._agree(len(good))
        batch = self._prepare_inputs(batch)
        candidates = self._score(batch, sample_id, good).subset(good)
        kept = self._choose(candidates, sizes, micro_step)
        self._take_note(batch, candidates, good, kept, sizes)
        return self._keep(batch, good, kept)

    def _agree(self, num_good: int) -> list[int]:
        """Tell the other ranks what all have to know before a selection; how many candidates each of them has."""
        passes = 0 if self.stream is None else self.stream.passes
        sizes, all_passes, stops = self.ranks.table(num_good, passes, self.stop_request.made).T.tolist()
        self.heed(any(stops))
        if self.stream is not None and min(all_passes) > self.selection_epoch:
            self.enter_epoch(min(all_passes))
        return sizes

    def _score(self, batch: Mapping[str, torch.Tensor], sample_id: torch.Tensor, good: torch.Tensor):
        if not self._scores_candidates():
            return CandidateScores(sample_id)
        with self.times.measure("scoring"):
            scores = score(
                self.model_wrapped,
                forward_inputs(self.model, batch),
                sample_id,
                kind=self.kind,
                chunk_size=self.args.scoring_batch_size,
                autocast=self.accelerator.autocast,
            )
            self._check_finite(scores.correlation[good], "the correlation", sample_id[good])
        return scores

    def _choose(self, candidates: CandidateScores, sizes: list[int], micro_step: int) -> Kept:
        chooses_alone = self.args.selection_scope == "local" or self.strategy.keeps_all or self.ranks.alone
        chooser = self.ranks.own if chooses_alone else 0
        self.strategy.generator.manual_seed(
            key_hash(f"{self.args.seed}/{self.state.global_step}/{micro_step}/{chooser}")
        )
        arguments = (self.strategy, candidates, self.ledger, sizes, self._num_selected)
        return select_among_own(*arguments) if chooses_alone else select_among_all(*arguments, self.ranks)

    def _keep(self, batch: Mapping[str, torch.Tensor], good: torch.Tensor, kept: Kept) -> dict[str, torch.Tensor]:
        if len(kept.indices) == len(batch["sample_id"]) and kept.weights is None:
            kept_batch = dict(batch)
        else:
            rows = good[kept.indices].to(self.args.device)
            kept_batch = {name: value[rows] for name, value in batch.items()}
            if kept.weights is not None:
                kept_batch["pair_weight"] = kept.weights.to(self.args.device)
        return share_out(kept_batch, kept.counts, self.ranks, getattr(self.data_collator, "padding", {}))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of the objective over the kept pairs of all ranks, weighted as the strategy asks."""
        outputs = model(**forward_inputs(model, inputs))
        loss = self._loss(model, inputs, outputs, *logit_scale_and_bias(model))
        return (loss, outputs) if return_outputs else loss

    def _loss(self, model, inputs, outputs, scale, bias, projections=None) -> torch.Tensor:
        loss = self.objective.loss(model, inputs, outputs, scale, bias, self.ledger, projections)
        if model.training:
            self._record_training(inputs["sample_id"], outputs)
        return loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        """The Trainer's step; stops before the weights are touched when the loss is not finite."""
        if len(inputs["sample_id"]) == 0:
            return torch.zeros((), device=self.args.device)
        if len(inputs["sample_id"]) <= (self.args.grad_cache_chunk_size or math.inf):
            loss = super().training_step(model, inputs, num_items_in_batch)
        else:
            loss = self._training_step_in_chunks(model, inputs)
        self._check_finite(loss, "the loss", inputs["sample_id"])
        return loss

    def _training_step_in_chunks(self, model, inputs) -> torch.Tensor:
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        inputs = self._prepare_inputs(inputs)
        share = 1 / self.current_gradient_accumulation_steps
        loss = grad_cached_backward(
            model,
            forward_inputs(model, inputs),
            lambda cached, scale, bias: self._loss(model, inputs, cached, scale, bias, cached["projections"]),
            chunk_size=self.args.grad_cache_chunk_size,
            backward=lambda part: self.accelerator.backward(part * share),
            no_sync=partial(self.accelerator.no_sync, model),
            autocast=self.compute_loss_context_manager,
            representations=partial(representations, model),
        )
        return loss * share

    # ---- what the selection leaves behind ----

    def _take_note(
        self,
        batch: Mapping[str, torch.Tensor],
        candidates: CandidateScores,
        good: torch.Tensor,
        kept: Kept,
        sizes: list[int],
    ) -> None:
        """Show the choice to the trace and the ledger of every rank."""
        is_clean = batch["is_clean"].cpu()[good] if "is_clean" in batch else None
        columns, measured = told_to_all(candidates, kept, is_clean, sizes, self.ranks)
        self.trace.observe(self.selection_epoch, self.state.global_step, columns)
        if "correlation" in columns:
            self._record(columns["sample_id"], columns["correlation"], measured)

    def _record(self, sample_id: torch.Tensor, correlation: torch.Tensor, measured=None) -> None:
        self.ledger.write("correlation", sample_id, correlation)
        self.strategy.record(sample_id, correlation, self.ledger, measured)

    def _record_training(self, sample_id: torch.Tensor, outputs: Mapping[str, torch.Tensor]) -> None:
        """Record what the training forward tells of its pairs: a history that costs no further forward."""
        evidence = self.objective.evidence(outputs, sample_id, self.ledger)
        columns = {"sample_id": sample_id, **evidence}
        if not self._scores_candidates():
            columns["correlation"] = correlation_of(outputs["image_embeds"], outputs["text_embeds"]).detach()
        if len(columns) == 1:
            return
        told = self.ranks.gather_columns(columns, [len(sample_id)] * self.ranks.count)
        if "correlation" in told:
            self._record(told["sample_id"], told["correlation"])
        self.objective.record(told["sample_id"], told, self.ledger)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the figures of the selection to the training logs."""
        if "loss" in logs:
            logs.update(self.monitor.pop_logs())
            logs.update(self.objective.decorrelation.pop_logs())
            if self.times["scoring"]:
                logs["selection_scoring_time_share"] = self.times["scoring"] / self.times.total
        super().log(logs, start_time)

    # ---- the run ----

    def train(self, resume_from_checkpoint: str | bool | None = None, **arguments):
        """Train as the Trainer does (see `ResumableTrainer`); with `save_run_folder`, leave a complete run folder."""
        if self.train_dataset is None:
            raise ValueError("train_dataset is missing: pass it to DissectTrainer.")
        warmup_epochs = {"train on a random subset": getattr(self.strategy, "warmup_epochs", 0)}
        if self.objective.gsc is not None:
            warmup_epochs["train by the contrastive loss, without soft labels"] = self.objective.gsc.warmup_epochs
        warn_if_warm_up_outlasts(self.train_dataset, warmup_epochs, self.args)
        if self.args.initial_ledger is not None and not resume_from_checkpoint:
            begin_with_ledger(self, self.args.initial_ledger)
        try:
            with self.times.measure("training"):
                output = super().train(resume_from_checkpoint=resume_from_checkpoint, **arguments)
        finally:
            self.stream = self._stream_batches = None  # its workers end
        self.trace.close()
        if self.args.save_run_folder:
            write_run_folder(self)
        return output

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, *ROW_KEYS, "task_id", "is_clean"]))

    # ---- small matters ----

    def _scores_candidates(self) -> bool:
        return self.args.record_selection or self.strategy.needs_scores(self.selection_epoch)

    def _num_selected(self, num_candidates: int) -> int:
        if self.strategy.keeps_all:
            return num_candidates
        return min(num_candidates, max(2, self.args.num_selected(num_candidates)))

    def _check_finite(self, values: torch.Tensor, what: str, sample_id: torch.Tensor) -> None:
        check_finite(values, what, sample_id, self.state.global_step, self.args.output_dir)


class _SelectionCallback(TrainerCallback):
    def __init__(self, trainer: DissectTrainer):
        self._trainer = trainer

    def on_optimizer_step(self, args, state, control, **kwargs):
        clamp_logit_scale_(self._trainer.model)
