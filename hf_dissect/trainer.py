"""The Hugging Face Trainer with one thing added: of each candidate batch, only the pairs worth a gradient train."""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback

from hf_dissect.adapters import restore_base, save_base
from hf_dissect.checkpoints import last_complete_checkpoint
from hf_dissect.data.bad_rows import BadRows
from hf_dissect.data.pairs import ROW_KEYS, key_hash
from hf_dissect.data_collator import SelectionCollator, tokenizer_of
from hf_dissect.evaluation.predictions import retrieval_of_predictions
from hf_dissect.losses import ContrastiveLoss, per_pair_loss
from hf_dissect.model_card import TAGS
from hf_dissect.models import (
    bare_model,
    check_dual_encoder,
    clamp_logit_scale_,
    contrastive_kind,
    logit_scale_and_bias,
    same_architecture,
    text_padding,
)
from hf_dissect.non_finite import NonFiniteLossError, check_finite
from hf_dissect.pair_scores import score_all_pairs
from hf_dissect.ranks import Ranks
from hf_dissect.run_folder import write_run_folder
from hf_dissect.selection import CandidateScores, SampleLedger, SelectionStrategy, score
from hf_dissect.selection.trace import SelectionTrace
from hf_dissect.task_routing import Decorrelation, check_tasks, forward_inputs, save_task_names
from hf_dissect.time_spent import TimeSpent
from hf_dissect.training_args import DissectTrainingArguments
from hf_dissect.training_data import (
    caption_length,
    check_images_fit,
    num_pairs,
    pairs_for,
    training_pairs,
    warn_if_never_selected,
)

logger = logging.getLogger(__name__)

__all__ = ["DissectTrainer", "NonFiniteLossError"]

LEDGER_FILE = "ledger.safetensors"


class DissectTrainer(Trainer):
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
        ledger: `SampleLedger` with the last correlation of each pair and the columns of the strategy.
        strategy: the `SelectionStrategy` in use.

    Raises:
        TypeError: `args` are no `DissectTrainingArguments`.
        ValueError: no processor, no data, fewer pairs than one batch, missing columns, bad ids, or a model that is no
            dual encoder.
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
            tokenizer_of(processing_class)
        train_dataset = training_pairs(train_dataset, args)
        eval_dataset = pairs_for("eval_dataset", eval_dataset, args)
        if model is not None:
            check_dual_encoder(model)
            check_images_fit(model, train_dataset)
        trainer_arguments.setdefault("compute_metrics", retrieval_of_predictions)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **trainer_arguments,
        )
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
        self.contrastive_loss = ContrastiveLoss(self.kind, args.mask_false_negatives)
        self.strategy = args.make_strategy() if strategy is None else strategy
        num_samples = getattr(train_dataset, "num_samples", None)
        self.ledger = SampleLedger(num_samples, columns=("correlation", *self.strategy.columns))
        self.bad_rows = BadRows(args.max_bad_fraction, num_pairs(train_dataset))
        self.ranks = Ranks(self.accelerator)
        self.trace = SelectionTrace(
            args.output_dir, self.ranks, records=args.record_selection, is_first_rank=self.is_world_process_zero()
        )
        self.monitor = self.trace.monitor
        self.decorrelation = Decorrelation()
        self.times = TimeSpent()
        self._epoch = 0
        self.add_callback(_SelectionCallback(self))

    # ---- the way of a pair: collated -> scored -> selected -> loss ----

    def get_batch_samples(self, epoch_iterator, num_batches: int, device):
        """Pull the candidate batches of one update and keep of each what its strategy selects."""
        with self.times.measure("data"):
            batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        return [self._select(batch, micro_step) for micro_step, batch in enumerate(batches)], num_items

    def _select(self, batch: Mapping[str, torch.Tensor], micro_step: int) -> dict[str, torch.Tensor]:
        sample_id = batch["sample_id"].cpu()
        good = self.bad_rows.add(sample_id, batch.get("bad_reason", torch.zeros_like(sample_id)).cpu())
        batch = self._prepare_inputs(batch)
        scores = self._score(batch, sample_id, good)
        num_good = self.ranks.smallest(len(good))
        if num_good == 0:
            return {name: value[:0] for name, value in batch.items()}
        candidates = scores if len(good) == len(sample_id) else scores.subset(good)
        step = self.state.global_step
        self.strategy.generator.manual_seed(
            key_hash(f"{self.args.seed}/{step}/{micro_step}/{self.args.process_index}")
        )
        selection = self.strategy.select(candidates, self.ledger, self._num_selected(num_good))
        indices = selection.indices[:num_good] if self.strategy.keeps_all else selection.indices
        self.trace.observe(self._epoch, step, batch, candidates, good, indices, selection.priority)
        if scores.image_embeds is not None:
            correlation = torch.full(sample_id.shape, torch.nan).index_copy(0, good, candidates.correlation)
            self._record(sample_id, correlation)
        if len(indices) == len(sample_id) and selection.weights is None:
            return batch
        kept = good[indices].to(self.args.device)
        batch = {name: value[kept] for name, value in batch.items()}
        if selection.weights is not None:
            batch["pair_weight"] = selection.weights.to(self.args.device)
        return batch

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

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The contrastive loss over the kept pairs of all ranks, weighted as the strategy asks.

        In training, a MoLA router adds its task-wise decorrelation loss over these pairs, where tasks are known.
        """
        outputs = model(**forward_inputs(model, inputs))
        scale, bias = logit_scale_and_bias(model)
        loss = self.contrastive_loss(
            outputs,
            scale=scale,
            bias=bias,
            weights=inputs.get("pair_weight"),
            image_key=inputs.get("image_key"),
            caption_key=inputs.get("caption_key"),
        )
        if model.training:
            loss = self.decorrelation.added_to(loss, model, inputs)
        if model.training and not self._scores_candidates():
            # Pairs that train unscored are recorded from the training forward: their history costs nothing.
            cosine = (outputs["image_embeds"] * outputs["text_embeds"]).sum(-1).detach().float()
            self._record(inputs["sample_id"], (cosine * 100).clamp_min(0))
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        """The Trainer's step; stops before the weights are touched when the loss is not finite."""
        if len(inputs["sample_id"]) == 0:
            return torch.zeros((), device=self.args.device)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._check_finite(loss, "the loss", inputs["sample_id"])
        return loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Loss of the batch's good pairs, the embeddings `(B, D)` of both sides, and what identifies the pairs."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**forward_inputs(model, inputs))
        bad_reason = inputs.get("bad_reason", torch.zeros_like(inputs["sample_id"]))
        good = bad_reason == 0
        loss = per_pair_loss(outputs["logits_per_text"][good][:, good], kind=self.kind).mean().detach()
        if prediction_loss_only:
            return loss, None, None
        embeds = (outputs["image_embeds"].detach().float(), outputs["text_embeds"].detach().float())
        return loss, embeds, (inputs.get("image_key", inputs["sample_id"]), bad_reason)

    # ---- what the selection leaves behind ----

    def _record(self, sample_id: torch.Tensor, correlation: torch.Tensor) -> None:
        sample_id, correlation = self.ranks.gather(sample_id), self.ranks.gather(correlation)
        scored = ~correlation.isnan()
        sample_id, correlation = sample_id[scored], correlation[scored]
        self.ledger.write("correlation", sample_id, correlation)
        self.strategy.record(sample_id, correlation, self.ledger)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the figures of the selection to the training logs."""
        if "loss" in logs:
            logs.update(self.monitor.pop_logs())
            logs.update(self.decorrelation.pop_logs())
            if self.times["scoring"]:
                logs["selection_scoring_time_share"] = self.times["scoring"] / self.times.total
        super().log(logs, start_time)

    # ---- training, evaluation, checkpoints ----

    def train(self, resume_from_checkpoint: str | bool | None = None, **arguments):
        """Train as the Trainer does; then, with `save_run_folder`, leave a complete run folder."""
        if self.train_dataset is None:
            raise ValueError("train_dataset is missing: pass it to DissectTrainer.")
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"No checkpoint to resume from in {self.args.output_dir}.")
        if resume_from_checkpoint:
            resume_from_checkpoint = str(resume_from_checkpoint)
            same_architecture(self.model, resume_from_checkpoint)
        else:
            self.trace.restart(step=0)
        self._epoch = -1
        warn_if_never_selected(self.train_dataset, getattr(self.strategy, "warmup_epochs", 0), self.args)
        with self.times.measure("training"):
            output = super().train(resume_from_checkpoint=resume_from_checkpoint, **arguments)
        self.trace.close()
        if self.args.save_run_folder:
            write_run_folder(self)
        return output

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Loss and retrieval (recall at 1, 5, 10 and median rank in both directions) on `eval_dataset`."""
        if not isinstance(eval_dataset, str):
            eval_dataset = pairs_for("eval_dataset", eval_dataset, self.args)
            check_tasks(self.model, self.train_dataset, eval_dataset)
        with self.times.measure("evaluation"):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def get_eval_dataloader(self, eval_dataset=None):
        """The Trainer's, but never without the last rows: `dataloader_drop_last` is meant for training batches."""
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = drop_last

    def score_pairs(self, dataset) -> dict[str, torch.Tensor]:
        """Correlation of every readable pair under the current weights, see `score_all_pairs`."""
        pairs = pairs_for("dataset", dataset, self.args)
        check_tasks(self.model, self.train_dataset, pairs)
        return score_all_pairs(self, pairs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save model and processor, and beside them the ledger, the recipe, and what an adapter needs to be loaded."""
        folder = Path(output_dir or self.args.output_dir)
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            self.ledger.save(folder / LEDGER_FILE, {"epoch": self._epoch, "strategy": self.strategy.name})
            if self.recipe is not None:
                self.recipe.save(folder / "recipe.yaml")
            if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):  # whose processes each hold a part only
                save_base(self.model, folder)
            save_task_names(self.train_dataset, folder)
        super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model, trial):
        self.trace.flush()
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        restore_base(self.model, resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self):
        restore_base(self.model, self.state.best_model_checkpoint)
        super()._load_best_model()

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        self.trace.restart(self.state.global_step)
        path = Path(checkpoint) / LEDGER_FILE
        if path.is_file():
            self._epoch = self.ledger.load(path)["epoch"] - 1  # which now begins again
        else:
            logger.warning("%s has no %s: the history of the pairs starts anew.", checkpoint, LEDGER_FILE)

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, *ROW_KEYS, "task_id", "is_clean"]))

    # ---- small matters ----

    def _begin_epoch(self) -> None:
        if num_pairs(self.train_dataset) is not None:
            self._epoch = int(self.state.epoch + 1e-6)
        else:
            # Of a stream the Trainer's epoch is a share of max_steps: passes are counted here instead.
            self._epoch += 1
        self.strategy.on_epoch_begin(self._epoch)

    def _scores_candidates(self) -> bool:
        return self.args.record_selection or self.strategy.needs_scores(self._epoch)

    def _num_selected(self, num_candidates: int) -> int:
        if self.strategy.keeps_all:
            return num_candidates
        return min(num_candidates, max(2, self.args.num_selected(num_candidates)))

    def _check_finite(self, values: torch.Tensor, what: str, sample_id: torch.Tensor) -> None:
        check_finite(values, what, sample_id, self.state.global_step, self.args.output_dir)


class _SelectionCallback(TrainerCallback):
    def __init__(self, trainer: DissectTrainer):
        self._trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._trainer._begin_epoch()

    def on_optimizer_step(self, args, state, control, **kwargs):
        clamp_logit_scale_(self._trainer.model)
