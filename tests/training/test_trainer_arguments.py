"""Arguments of transformers' Trainer: each works, or is refused before training with the way out."""

import numpy as np
import pytest
import torch
from peft import LoraConfig
from testing import tiny_models
from testing.tiny_models import tiny_pairs
from transformers import FlavaConfig, FlavaModel

from hf_dissect import DissectTrainer, DissectTrainingArguments
from hf_dissect.evaluation.predictions import compute_retrieval
from hf_dissect.evaluation.recall import RETRIEVAL_FIGURES, retrieval_metrics

SETTINGS = dict(
    per_device_train_batch_size=16,
    max_steps=1,
    learning_rate=1e-3,
    selection_strategy="none",
    save_strategy="no",
    save_run_folder=False,
    report_to="none",
    disable_tqdm=True,
    use_cpu=True,
)


def make_trainer(folder, model=None, processor=None, settings=None, **given):
    if model is None and "model_init" not in given:
        model, processor = tiny_models.tiny_clip()
    return DissectTrainer(
        model=model,
        processing_class=processor or tiny_models.tiny_clip()[1],
        args=DissectTrainingArguments(str(folder), **{**SETTINGS, **(settings or {})}),
        train_dataset=given.pop("train_dataset", tiny_pairs(32)),
        eval_dataset=given.pop("eval_dataset", tiny_pairs(20, seed=1)),
        **given,
    )


def weights(model):
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 cannot be used.*soften the targets with gsc"),
        ({"train_sampling_strategy": "group_by_length"}, "'group_by_length' cannot be used.*'random' or 'sequential'"),
        ({"train_sampling_strategy": "batch_rebalance"}, "'batch_rebalance' cannot be used"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size=True cannot be used.*grad_cache_chunk_size"),
        ({"bf16_full_eval": True}, "bf16_full_eval=True cannot be used.*use bf16,"),
        ({"fp16_full_eval": True}, "fp16_full_eval=True cannot be used.*use fp16,"),
        ({"batch_eval_metrics": True}, "batch_eval_metrics=True.*among all images.*or pass compute_metrics"),
        ({"eval_do_concat_batches": False}, "eval_do_concat_batches=False.*or pass compute_metrics"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha=5.0 adds noise.*CLIPModel.*leave it out"),
        ({"metric_for_best_model": "accuracy"}, "metric_for_best_model='accuracy' is not a figure.*recall_sum"),
        ({"metric_for_best_model": "eval_recall@1"}, "'eval_recall@1' is not a figure"),
    ],
    ids=str,
)
def test_arguments_without_a_meaning_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        make_trainer(tmp_path, settings=settings)


def test_functions_without_a_meaning_are_refused(tmp_path):
    with pytest.raises(ValueError, match="compute_loss_func cannot be used.*Override compute_loss"):
        make_trainer(tmp_path, compute_loss_func=lambda outputs, labels, num_items_in_batch=None: outputs[0])
    trainer = make_trainer(tmp_path, model_init=lambda trial=None: tiny_models.tiny_clip()[0])
    trainer.hp_search_backend = "optuna"  # as hyperparameter_search sets it
    with pytest.raises(ValueError, match="hyperparameter_search cannot be used.*new DissectTrainer for each trial"):
        trainer.train()


@pytest.mark.parametrize("metric", ["loss", "recall_sum", "eval_text_to_image_R@5", "image_to_text_median_rank"])
def test_any_figure_chooses_the_best_checkpoint(metric, tmp_path):
    settings = {"load_best_model_at_end": True, "metric_for_best_model": metric, "max_steps": 2}
    settings |= {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    trainer = make_trainer(tmp_path, settings=settings)
    trainer.train()
    assert trainer.state.best_model_checkpoint is not None


def test_the_names_of_the_figures_are_those_of_an_evaluation_of_several_data_sets(tmp_path):
    assert set(retrieval_metrics(np.eye(3), np.eye(3))) == set(RETRIEVAL_FIGURES)
    several = {"first": tiny_pairs(16), "second": tiny_pairs(12, seed=1)}
    trainer = make_trainer(tmp_path, settings={"metric_for_best_model": "second_recall_sum"}, eval_dataset=several)
    figures = trainer.evaluate()
    assert {f"eval_{part}_{name}" for part in several for name in RETRIEVAL_FIGURES} <= figures.keys()
    with pytest.raises(ValueError, match="'recall_sum' is not a figure.*first_loss, first_image_to_text_R@1"):
        make_trainer(tmp_path, settings={"metric_for_best_model": "recall_sum"}, eval_dataset=several)


@pytest.mark.parametrize("num_rows", [20, 21])
def test_predict_takes_a_plain_table_and_returns_the_embeddings_of_all_rows(num_rows, tmp_path):
    trainer = make_trainer(tmp_path, settings={"dataloader_drop_last": True, "per_device_eval_batch_size": 8})
    rows = tiny_pairs(num_rows, seed=2)
    output = trainer.predict(rows)
    batch = trainer.data_collator([{**row, "sample_id": number} for number, row in enumerate(rows)])
    with torch.no_grad():
        model = trainer.model.eval()
        expected = model(**{key: batch[key] for key in ("input_ids", "attention_mask", "pixel_values")})
    for found, wanted in zip(output.predictions, (expected.image_embeds, expected.text_embeds), strict=True):
        assert found.shape == (num_rows, 32) and np.abs(found - wanted.numpy()).max() < 1e-5
    assert output.metrics["test_recall_sum"] == trainer.evaluate(rows)["eval_recall_sum"]
    with pytest.raises(ValueError, match="eval_dataset: "):
        trainer.predict(rows.remove_columns("caption"))


def test_metrics_of_a_user_get_batches_inputs_and_changed_predictions(tmp_path):
    seen = []

    def compute_metrics(prediction, compute_result=True):
        seen.append((prediction, compute_result))
        return {"rows": float(len(prediction.label_ids[0]))}

    settings = {"batch_eval_metrics": True, "include_for_metrics": ["inputs", "loss"], "per_device_eval_batch_size": 8}
    trainer = make_trainer(
        tmp_path,
        settings={**settings, "metric_for_best_model": "rows"},
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=lambda predictions, labels: tuple(part[:, :5] for part in predictions),
    )
    trainer.evaluate()
    assert [result for _, result in seen] == [False, False, True]
    assert all(prediction.predictions[0].shape[1] == 5 and prediction.inputs is not None for prediction, _ in seen)
    trainer = make_trainer(
        tmp_path,
        settings={"eval_do_concat_batches": False, "per_device_eval_batch_size": 8},
        compute_metrics=lambda prediction: {"batches": float(len(prediction.predictions))},
    )
    assert trainer.evaluate()["eval_batches"] == 3


def test_no_metrics_give_the_loss_alone(tmp_path):
    figures = make_trainer(tmp_path, compute_metrics=None).evaluate()
    assert "eval_loss" in figures and not any("recall" in name for name in figures)


def test_a_model_that_is_made_later_and_optimisers_of_a_user_train(tmp_path):
    trainer = make_trainer(tmp_path, model_init=lambda trial=None: tiny_models.tiny_clip()[0])
    before = weights(trainer.model)
    trainer.train()
    assert not torch.equal(weights(trainer.model), before)
    model, processor = tiny_models.tiny_clip()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    make_trainer(tmp_path, model, processor, optimizers=(optimizer, None)).train()
    assert torch.equal(weights(model), weights(tiny_models.tiny_clip()[0]))
    trainer = make_trainer(tmp_path, optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.0}))
    trainer.train()
    assert torch.equal(weights(trainer.model), weights(tiny_models.tiny_clip()[0]))


@pytest.mark.parametrize(
    "settings",
    [
        {"torch_empty_cache_steps": 1},
        {"include_num_input_tokens_seen": "all"},
        {"label_names": ["labels"]},
        {"remove_unused_columns": False},
        {"accelerator_config": {"split_batches": True}},
        {"eval_use_gather_object": True, "eval_strategy": "steps", "eval_steps": 1},
        {"dataloader_drop_last": True},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_other_arguments_leave_the_run_as_it_is(settings, tmp_path):
    trainer, plain = (make_trainer(tmp_path, settings=given) for given in (settings, {}))
    trainer.train()
    plain.train()
    assert torch.equal(weights(trainer.model), weights(plain.model))


# ---- models ----


def tiny_flava():
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = FlavaConfig(
        image_config={**tower, "image_size": 32, "patch_size": 16},
        text_config={**tower, "vocab_size": 2000},
        multimodal_config=tower,
        projection_dim=16,
    )
    return FlavaModel(config)


def test_a_model_with_other_outputs_is_refused(tmp_path):
    with pytest.raises(ValueError, match="FlavaModel returns FlavaModelOutput, without image_embeds, text_embeds"):
        make_trainer(tmp_path, tiny_flava(), tiny_models.tiny_clip()[1])


class WithoutLogits(type(tiny_models.tiny_clip()[0])):
    """A CLIP whose forward returns a plain dict of embeddings, and neither logits nor a loss."""

    def forward(self, input_ids=None, attention_mask=None, pixel_values=None):
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask, pixel_values=pixel_values)
        return {"image_embeds": output.image_embeds, "text_embeds": output.text_embeds}


class AsTuple(WithoutLogits):
    """A CLIP whose forward returns a tuple."""

    def forward(self, **inputs):
        return tuple(super().forward(**inputs).values())


class OtherNames(WithoutLogits):
    """A CLIP whose forward names the embeddings in its own way."""

    def forward(self, **inputs):
        output = super().forward(**inputs)
        return {"image_vectors": output["image_embeds"], "text_embeds": output["text_embeds"]}


def changed(kind):
    model, processor = tiny_models.tiny_clip()
    own = kind(model.config)
    own.load_state_dict(model.state_dict())
    return own, processor


def test_a_model_without_logits_and_loss_trains_and_is_evaluated_as_one_with_them(tmp_path):
    settings = {"check_reload": False}
    own, plain = (make_trainer(tmp_path, *pair, settings=settings) for pair in (changed(WithoutLogits), (None, None)))
    for trainer in (own, plain):
        trainer.train()
    assert (weights(own.model) - weights(plain.model)).abs().max() < 1e-4  # Adam divides by small gradients
    assert own.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], abs=1e-4)


@pytest.mark.parametrize("strategy", ["none", "dissect"])
@pytest.mark.parametrize(
    ("kind", "message"),
    [(AsTuple, "returns a tuple.*config.return_dict"), (OtherNames, "lack image_embeds .it returns image_vectors")],
)
def test_outputs_that_cannot_be_read_are_described(kind, message, strategy, tmp_path):
    settings = {"check_reload": False, "selection_strategy": strategy, "selection_warmup_epochs": 0}
    settings |= {"selection_options": {"variant": "momentum"}} if strategy == "dissect" else {}
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, *changed(kind), settings=settings).train()


@pytest.mark.parametrize("family", ["tiny_clip", "tiny_siglip", "tiny_dual_encoder", "tiny_align"])
@pytest.mark.parametrize("adapted", [False, True])
def test_tokens_without_embeddings_are_refused(family, adapted, tmp_path):
    model, processor = getattr(tiny_models, family)()
    size = len(processor.tokenizer)
    processor.tokenizer.add_tokens(["zebra", "yak"])
    if adapted:
        model.add_adapter(LoraConfig(r=2, target_modules=["token_embedding", "word_embeddings"]))
    with pytest.raises(
        ValueError, match=f"tokens up to number {size + 1}, .* embeddings for {size} only.*resize_token"
    ):
        make_trainer(tmp_path, model, processor)
    if not adapted:
        model.text_model.resize_token_embeddings(len(processor.tokenizer))
        make_trainer(tmp_path, model, processor)


def test_a_model_that_does_not_train_or_cannot_be_saved_is_refused(tmp_path):
    model, processor = tiny_models.tiny_clip()
    with pytest.raises(ValueError, match="No weight of the model trains.*is_trainable=True"):
        make_trainer(tmp_path, model.requires_grad_(False), processor)
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="one")
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="two")
    model.set_adapter(["one", "two"])
    with pytest.raises(ValueError, match="adapters one, two are active at once.*set_adapter"):
        make_trainer(tmp_path, model, processor)


def test_the_default_metrics_are_those_of_retrieval(tmp_path):
    assert make_trainer(tmp_path).compute_metrics is compute_retrieval
