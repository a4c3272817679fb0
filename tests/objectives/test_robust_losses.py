"""RINCE and SymNCE as objectives of real runs."""

import pytest
import torch
from testing import tiny_models
from testing.faulty_run import make_trainer

from hf_dissect import DissectTrainer, DissectTrainingArguments, Recipe, TwinDualEncoder
from hf_dissect.losses.robust_rows import rince_losses, symnce_losses
from hf_dissect.models.loading import logit_scale_and_bias
from hf_dissect.objective import Objective
from hf_dissect.objectives.rince import RinceObjective
from hf_dissect.objectives.symnce import SymnceObjective
from hf_dissect.recipe.fields import RecipeError
from hf_dissect.selection import SampleLedger

WEIGHTS = torch.tensor([1.0, 0.0, 2.0, 0.5])
PLAIN = {"selection_strategy": "none", "selection_options": None, "record_selection": False}


@pytest.fixture(scope="module")
def clip():
    model, processor = tiny_models.tiny_clip()
    inputs = tiny_models.tiny_inputs(model, processor, tiny_models.CAPTIONS[:4])
    return model.train(), model(**inputs)


def loss_of(robust, clip, epoch=0, **batch):
    model, outputs = clip
    objective = Objective("softmax", robust=robust)
    objective.on_epoch_begin(epoch)
    batch = {"sample_id": torch.arange(4), **batch}
    return objective.compute_loss(model, batch, outputs, *logit_scale_and_bias(model), SampleLedger(4))


@pytest.mark.parametrize("temperature", [None, 0.1])
def test_the_loss_is_the_weighted_mean_of_both_directions(clip, temperature):
    model, outputs = clip
    logits = outputs["logits_per_text"]
    if temperature is not None:
        logits = logits / model.logit_scale.exp() / temperature
    for robust, rows in (
        (RinceObjective(q=0.3, lam=0.1, temperature=temperature), lambda x: rince_losses(x, 0, None, q=0.3, lam=0.1)),
        (SymnceObjective(beta=0.5, temperature=temperature), lambda x: symnce_losses(x, 0, None, beta=0.5)),
    ):
        losses = (rows(logits) + rows(logits.T)) / 2
        torch.testing.assert_close(loss_of(robust, clip), losses.mean())
        torch.testing.assert_close(loss_of(robust, clip, pair_weight=WEIGHTS), (losses * WEIGHTS).mean())
        assert loss_of(robust, clip, pair_weight=torch.zeros(4)) == 0
        (gradient,) = torch.autograd.grad(loss_of(robust, clip), [model.logit_scale], retain_graph=True)
        assert (gradient == 0) == (temperature is not None)  # None would keep DDP waiting


def test_the_warm_up_trains_by_the_contrastive_loss(clip):
    robust = SymnceObjective(beta=1.0, warmup_epochs=2)
    logits = clip[1]["logits_per_text"]
    contrastive = -(logits.log_softmax(1).diagonal() + logits.log_softmax(0).diagonal()).mean() / 2
    torch.testing.assert_close(loss_of(robust, clip, epoch=1), contrastive)
    assert loss_of(robust, clip, epoch=2) != contrastive


@pytest.mark.parametrize("objective", [{"rince": {"q": 0.2}}, {"symnce": {}}])
def test_chunks_accumulation_and_masks_go_with_it(objective, tmp_path):
    weights = []
    for chunk in (None, 3):
        trainer = make_trainer(
            tmp_path, **PLAIN, **objective, grad_cache_chunk_size=chunk, gradient_accumulation_steps=2,
            optim="sgd", learning_rate=0.01, mask_false_negatives=True, save_strategy="no", max_steps=6,
        )  # fmt: skip
        trainer.train()
        weights.append(torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()]))
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-4)


def test_models_of_another_loss_or_of_two_networks_are_refused(tmp_path):
    for name in ("rince", "symnce"):
        for model, message in (
            (tiny_models.tiny_siglip(), f"{name}: .* sigmoid loss; use a model of the softmax loss"),
            ((TwinDualEncoder.of(tiny_models.tiny_clip()[0], tiny_models.tiny_clip(seed=1)[0]),), "two networks"),
        ):
            with pytest.raises(ValueError, match=message):
                DissectTrainer(
                    model=model[0],
                    processing_class=tiny_models.tiny_clip()[1] if len(model) == 1 else model[1],
                    train_dataset=tiny_models.tiny_pairs(16),
                    args=DissectTrainingArguments(
                        str(tmp_path), per_device_train_batch_size=8, use_cpu=True, **{name: {}}
                    ),
                )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rince": {"q": 0}}, r"rince: q=0 is not allowed; allowed: a number in \(0, 1\]"),
        ({"rince": {"q": 1.5}}, "rince: q=1.5"),
        ({"rince": {"lam": 0.0}}, "rince: lam=0.0"),
        ({"rince": '{"temperature": 0}'}, "rince: temperature=0"),
        ({"rince": {"lambda": 0.1}}, "rince=.*'lambda' is not a setting of it; allowed: q, lam, temperature"),
        ({"symnce": {"beta": -1}}, "symnce: beta=-1"),
        ({"symnce": {"warmup_epochs": 3}}, "symnce: warmup_epochs=3 leaves no epoch with its loss"),
        ({"symnce": {}, "rince": {}}, "symnce=.*does not go with rince: each replaces the contrastive loss"),
        ({"symnce": {}, "gsc": {}}, "does not go with"),
    ],
)
def test_impossible_settings_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        DissectTrainingArguments("unused", per_device_train_batch_size=8, num_train_epochs=3, **given)
    (name, value), *more = given.items()
    if not isinstance(value, str):
        overrides = [f"objective.{key}={text}" for key, text in given.items()]
        with pytest.raises(RecipeError, match=f"objective.{name if not more else ''}"):
            Recipe.load("quickstart", [*overrides, "training.num_train_epochs=3", "selection.warmup_epochs=1"])


def test_a_recipe_sets_them():
    recipe = Recipe.load("quickstart", ["objective.rince.q=0.1", "objective.rince.lam=0.5"])
    arguments = DissectTrainingArguments(**recipe.training_arguments())
    robust = arguments.make_robust_objective()
    assert (robust.name, robust.q, robust.lam, robust.temperature) == ("rince", 0.1, 0.5, 0.07)
    recipe = Recipe.load("quickstart", ["objective.symnce={}"])
    assert DissectTrainingArguments(**recipe.training_arguments()).make_robust_objective().name == "symnce"
