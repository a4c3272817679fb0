"""A Trainer that evaluates dual encoders by retrieval, on pairs of which some may be unreadable."""

import torch
from transformers import Trainer

from hf_dissect.data.model_inputs import forward_inputs
from hf_dissect.evaluation.pair_scores import score_all_pairs
from hf_dissect.evaluation.predictions import retrieval_of_predictions
from hf_dissect.losses import per_pair_loss
from hf_dissect.training_data import check_tasks, pairs_for


class EvaluatingTrainer(Trainer):
    """Tells retrieval beside the loss. The attributes it reads are made by `DissectTrainer`."""

    def __init__(self, *arguments, **keywords):
        keywords.setdefault("compute_metrics", retrieval_of_predictions)
        super().__init__(*arguments, **keywords)

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
