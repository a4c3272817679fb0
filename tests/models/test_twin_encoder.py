"""Two dual encoders in one: what they answer, how GSC+ trains each by the other's labels, and what a run leaves."""

import pytest
import torch
import torch.nn.functional as F
from testing import tiny_models
from testing.tiny_recipe import tiny_recipe
from transformers import AutoModel, CLIPModel

from hf_dissect import DissectTrainer, DissectTrainingArguments, Recipe, SampleLedger, TwinDualEncoder
from hf_dissect.data import shuffle_captions
from hf_dissect.evaluation.selection_figures import compute_label_figures
from hf_dissect.losses import ContrastiveLoss
from hf_dissect.losses.gsc import GscLoss, gsc_evidence
from hf_dissect.models.loading import check_dual_encoder, clamp_logit_scale_, find_loss_kind, freeze_tower
from hf_dissect.models.loading import logit_scale_and_bias as scale_and_bias
from hf_dissect.objective import Objective
from hf_dissect.objectives.gsc import GscObjective
from hf_dissect.recipe.recipe import RecipeError
from hf_dissect.runs.run import build_trainer, run_recipe

IDS = torch.arange(4)


def tiny_twins() -> tuple[TwinDualEncoder, object]:
    (first, processor), (second, _) = tiny_models.tiny_clip(seed=0), tiny_models.tiny_clip(seed=1)
    with torch.no_grad():
        second.logit_scale.fill_(2.0)
    return TwinDualEncoder.of(first, second), processor


@pytest.fixture(scope="module")
def answers():
    """Twins, the inputs of four pairs, and what the twins and each of them make of these."""
    twins, processor = tiny_twins()
    inputs = tiny_models.tiny_inputs(twins, processor, tiny_models.CAPTIONS[:4])
    return twins, inputs, twins(**inputs), [network(**inputs) for network in twins.networks]


# ---- the model ----


def test_similarities_are_the_means_of_those_of_the_two(answers):
    twins, inputs, both, alone = answers
    cosines = [output.text_embeds @ output.image_embeds.T for output in alone]
    torch.testing.assert_close(both.text_embeds @ both.image_embeds.T, sum(cosines) / 2)
    torch.testing.assert_close(both.image_embeds.norm(dim=-1), torch.ones(4))
    scales = [network.logit_scale.exp() for network in twins.networks]
    torch.testing.assert_close(both.logits_per_text, sum(cosines) / 2 * sum(scales) / 2)
    torch.testing.assert_close(both.logits_per_image, both.logits_per_text.T)
    images = twins.get_image_features(pixel_values=inputs["pixel_values"])
    texts = twins.get_text_features(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    torch.testing.assert_close((images, texts), (both.image_embeds, both.text_embeds))


def test_twins_are_dual_encoders_with_two_scales():
    twins, _ = tiny_twins()
    check_dual_encoder(twins)
    assert find_loss_kind(twins) == "softmax"
    scale, bias = scale_and_bias(twins)
    torch.testing.assert_close(scale, torch.stack([network.logit_scale.exp() for network in twins.networks]))
    assert bias.tolist() == [0, 0]
    with torch.no_grad():
        twins.first.logit_scale.fill_(9.0)
        twins.second.logit_scale.fill_(-1.0)
    clamp_logit_scale_(twins)
    torch.testing.assert_close(scale_and_bias(twins)[0], torch.tensor([100.0, 1.0]))
    assert freeze_tower(twins, "vision") == 2 * sum(p.numel() for p in twins.first.vision_model.parameters())
    assert not any(p.requires_grad for net in twins.networks for p in net.vision_model.parameters())


def test_what_is_saved_is_what_is_loaded(answers, tmp_path):
    twins, inputs, both, alone = answers
    twins.save_pretrained(tmp_path / "twins")
    loaded = AutoModel.from_pretrained(tmp_path / "twins").eval()
    assert isinstance(loaded, TwinDualEncoder)
    torch.testing.assert_close(loaded(**inputs).logits_per_text, both.logits_per_text, rtol=0, atol=0)
    loaded.second.save_pretrained(tmp_path / "second")
    second = CLIPModel.from_pretrained(tmp_path / "second").eval()
    torch.testing.assert_close(second(**inputs).logits_per_text, alone[1].logits_per_text, rtol=0, atol=0)


def test_gradient_checkpointing_reaches_both_and_changes_nothing():
    twins, processor = tiny_twins()
    inputs, gradients = tiny_models.tiny_inputs(twins, processor, tiny_models.CAPTIONS[:4]), []
    for enable in (lambda: None, twins.gradient_checkpointing_enable):
        enable()
        twins.train().zero_grad()
        twins(**inputs).logits_per_text.diagonal().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in twins.parameters()])
    checkpointed = [part for part in twins.modules() if getattr(part, "gradient_checkpointing", False)]
    assert any(part in checkpointed for part in twins.first.modules())
    assert any(part in checkpointed for part in twins.second.modules())
    torch.testing.assert_close(*gradients)


def test_networks_that_cannot_be_joined_are_refused():
    clip, siglip = tiny_models.tiny_clip()[0], tiny_models.tiny_siglip()[0]
    with pytest.raises(ValueError, match="SiglipModel trains with the sigmoid loss"):
        TwinDualEncoder.of(clip, siglip)
    narrow = CLIPModel(
        type(clip.config)(
            text_config=clip.config.text_config.to_dict() | {"projection_dim": 16},
            vision_config=clip.config.vision_config.to_dict() | {"projection_dim": 16},
            projection_dim=16,
        )
    )
    with pytest.raises(ValueError, match=r"differ in projection_dim \(32 and 16\)"):
        TwinDualEncoder.of(clip, narrow)
    larger = CLIPModel(type(clip.config).from_dict(clip.config.to_dict()))
    larger.config.text_config.vocab_size += 1
    with pytest.raises(ValueError, match=r"differ in text_config.vocab_size"):
        TwinDualEncoder.of(clip, larger)


# ---- the objective ----


@pytest.fixture
def ledger() -> SampleLedger:
    ledger = SampleLedger(4, columns=GscObjective(dual=True).columns)
    for name, values in {
        "y_cm": [0.9, 0.2, 0.5, 1.0],
        "y_im": [0.7, 0.8, 0.5, 0.1],
        "y_cm_2": [0.3, 0.6, 1.0, 0.9],
        "y_im_2": [0.4, 0.9, 0.8, 0.2],
    }.items():
        ledger.write(name, IDS, torch.tensor(values))
    return ledger


FIRST, SECOND = torch.tensor([0.7, 0.2, 0.5, 0.1]), torch.tensor([0.3, 0.6, 0.8, 0.2])


def test_each_network_trains_with_the_labels_of_the_other(answers, ledger):
    twins, _, both, alone = answers
    objective = Objective("softmax", robust=GscObjective(gamma=0.5, warmup_epochs=1, dual=True), num_networks=2)
    weights = torch.tensor([1.0, 2.0, 0.0, 1.0])

    def loss(**batch):
        return objective.compute_loss(twins, {"sample_id": IDS, **batch}, both, *scale_and_bias(twins), ledger)

    for given in (None, weights):
        contrastive = sum(ContrastiveLoss()(output, weights=given) for output in alone)
        torch.testing.assert_close(loss(pair_weight=given), contrastive)
    objective.on_epoch_begin(1)
    gsc, embeds = GscLoss(gamma=0.5), [(output.image_embeds, output.text_embeds) for output in alone]
    expected = gsc(*embeds[0], SECOND) + gsc(*embeds[1], FIRST)
    torch.testing.assert_close(loss(), expected)
    evidence = objective.compute_evidence(both, IDS, ledger)
    torch.testing.assert_close(evidence, objective.compute_evidence(both, IDS, ledger))  # without a loss before it
    own, other = gsc_evidence(*embeds[0], SECOND), gsc_evidence(*embeds[1], FIRST)
    torch.testing.assert_close(
        evidence, own | {"agreement_2": other["agreement"], "structure_2": other["structure"]}, rtol=1e-4, atol=1e-6
    )
    weighted = gsc(*embeds[0], SECOND * weights) + gsc(*embeds[1], FIRST * weights)
    torch.testing.assert_close(loss(pair_weight=weights), weighted)
    torch.testing.assert_close(objective.compute_evidence(both, IDS, ledger), evidence, rtol=1e-4, atol=1e-6)


def test_the_evidence_of_each_network_is_recorded_by_itself(ledger):
    objective = Objective("softmax", robust=GscObjective(beta=0.5, dual=True), num_networks=2)
    columns = {"agreement": 0.5, "structure": 0.1, "agreement_2": 0.25, "structure_2": 0.2}
    objective.robust.record(IDS, {name: torch.full((4,), value) for name, value in columns.items()}, ledger)
    objective.update(ledger)
    torch.testing.assert_close(ledger.column("y_cm"), torch.tensor([0.7, 0.35, 0.5, 0.75]))
    torch.testing.assert_close(ledger.column("y_cm_2"), torch.tensor([0.275, 0.425, 0.625, 0.575]))


def test_the_labels_of_both_tell_matched_from_mismatched(ledger):
    # The means of the minima: 0.5, 0.4, 0.65, 0.15.
    assert compute_label_figures(ledger, IDS, torch.tensor([True, False, True, False])) == {"label_auroc": 1.0}
    assert compute_label_figures(ledger, IDS, torch.tensor([True, True, False, False])) == {"label_auroc": 0.5}


def test_one_network_where_two_are_meant_is_refused_and_the_reverse():
    with pytest.raises(ValueError, match=r"gsc: dual=true .*TwinDualEncoder\.of\(first, second\)"):
        Objective("softmax", robust=GscObjective(dual=True))
    with pytest.raises(ValueError, match="gsc: the model consists of two networks"):
        Objective("softmax", robust=GscObjective(), num_networks=2)
    Objective("softmax", num_networks=2)  # plain training of both


# ---- in a run ----


def twin_trainer(folder, **settings) -> DissectTrainer:
    twins, processor = tiny_twins()
    defaults = dict(
        gsc={"dual": True, "gamma": 0.1},
        selection_strategy="none",
        per_device_train_batch_size=16,
        num_train_epochs=3,
        optim="sgd",
        learning_rate=0.05,
        save_strategy="steps",
        save_steps=6,
        save_run_folder=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    return DissectTrainer(
        model=twins,
        processing_class=processor,
        train_dataset=shuffle_captions(tiny_models.tiny_pairs(64), rate=0.25),
        args=DissectTrainingArguments(str(folder), **defaults | settings),
    )


def state_of(trainer: DissectTrainer) -> dict[str, torch.Tensor]:
    columns = {name: trainer.ledger.column(name).clone() for name in trainer.ledger.columns}
    return columns | {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


def test_a_resumed_run_is_the_uninterrupted_one_and_gradient_caching_changes_nothing(tmp_path):
    whole = twin_trainer(tmp_path)
    whole.train()
    found = state_of(whole)
    assert not found["y_cm"].equal(found["y_cm_2"]) and found["y_im_2"].isfinite().all()
    resumed = twin_trainer(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    torch.testing.assert_close(state_of(resumed), found, rtol=0, atol=0, equal_nan=True)
    cached = twin_trainer(tmp_path / "cached", grad_cache_chunk_size=5)
    cached.train()
    torch.testing.assert_close(state_of(cached), found, rtol=1e-3, atol=1e-4, equal_nan=True)


def test_a_rule_selects_by_what_both_say(tmp_path):
    trainer = twin_trainer(tmp_path, selection_strategy="small_loss", max_steps=1, learning_rate=0.0)
    trainer.train()
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(64)])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad():
        outputs = [network.eval()(**inputs) for network in trainer.model.networks]
    cosines = sum(F.cosine_similarity(output.image_embeds, output.text_embeds) for output in outputs) / 2
    recorded = trainer.ledger.column("correlation")
    seen = ~recorded.isnan()
    assert seen.sum() == 16
    torch.testing.assert_close(recorded[seen], (cosines * 100).clamp_min(0)[seen], rtol=1e-4, atol=1e-3)


DUAL = {"gsc": {"dual": True}}


def test_a_recipe_trains_twins_that_start_differently_and_can_go_on(tmp_path):
    metrics = run_recipe(tiny_recipe(tmp_path / "run", objective=DUAL, selection={"strategy": "none"}))
    assert 0 < metrics["final"]["recall_sum"] <= 600 and 0 <= metrics["selection"]["label_auroc"] <= 1
    twins = AutoModel.from_pretrained(tmp_path / "run")
    first, second = (network.text_model.embeddings.token_embedding.weight for network in twins.networks)
    assert (first - second).norm() > first.norm() / 2
    goes_on = tiny_recipe(
        tmp_path / "more", objective=DUAL, model={"config": None, "name_or_path": str(tmp_path / "run")}
    )
    model = build_trainer(goes_on).model
    assert torch.equal(model.second.logit_scale, twins.second.logit_scale)


def test_trained_networks_start_from_two_places(tmp_path):
    for seed, name in enumerate(("one", "other")):
        model, processor = tiny_models.tiny_clip(seed)
        model.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
    one, other = str(tmp_path / "one"), str(tmp_path / "other")

    def recipe(**model) -> Recipe:
        model = {"config": None, "vocab_size": None, "name_or_path": one, **model}
        return tiny_recipe(tmp_path / "run", objective=DUAL, model=model)

    for second in ({}, {"second_name_or_path": one}):
        with pytest.raises(ValueError, match="both networks would start as .* model.second_name_or_path"):
            build_trainer(recipe(**second))
    trainer = build_trainer(recipe(second_name_or_path=other, freeze="vision"))
    weights = [AutoModel.from_pretrained(place).visual_projection.weight for place in (one, other)]
    for network, weight in zip(trainer.model.networks, weights, strict=True):
        assert torch.equal(network.visual_projection.weight, weight)
        assert not any(parameter.requires_grad for parameter in network.vision_model.parameters())


@pytest.mark.parametrize(
    "sections, message",
    [
        ({"model": {"second_name_or_path": "a/b"}}, "objective.gsc.dual is not true"),
        ({"objective": DUAL, "model": {"second_name_or_path": "a/b"}}, "would not fit a model from scratch"),
        ({"objective": DUAL, "adapter": {"type": "lora"}}, "true trains two whole networks"),
    ],
)
def test_settings_that_contradict_two_networks_are_told(sections, message, tmp_path):
    with pytest.raises(RecipeError, match=message):
        tiny_recipe(tmp_path, **sections)


def test_a_frozen_from_scratch_tower_is_frozen_in_both(tmp_path):
    recipe = tiny_recipe(tmp_path, objective=DUAL, model={"freeze": "text"})
    for network in build_trainer(recipe).model.networks:
        assert not any(parameter.requires_grad for parameter in network.text_model.parameters())
