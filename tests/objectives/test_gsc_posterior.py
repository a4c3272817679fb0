"""GSC with the posterior of the noisy channel as its evidence, and its labels as an opinion about the pairs."""

import json
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from testing import tiny_models
from testing.cached_steps import model_and_batch
from testing.faulty_run import make_trainer
from testing.launched import on_ranks
from torch.nn.parallel import DistributedDataParallel

from hf_dissect import DissectTrainer, DissectTrainingArguments, Recipe, TwinDualEncoder
from hf_dissect.data import shuffle_captions
from hf_dissect.data.model_inputs import forward_inputs
from hf_dissect.distributed import Ranks
from hf_dissect.models.loading import logit_scale_and_bias
from hf_dissect.objective import Objective
from hf_dissect.objectives.gsc import GscObjective
from hf_dissect.recipe.fields import RecipeError
from hf_dissect.selection import SampleLedger

POSTERIOR = {"evidence": "posterior"}
IDS = torch.tensor([3, 9, 4, 1, 30, 22])


def find_posterior(images: torch.Tensor, texts: torch.Tensor, temperature: float, pi: float) -> torch.Tensor:
    """`pi n q / (pi n q + 1 - pi)` with the geometric mean `q` of the probabilities of both directions."""
    logits, n = texts @ images.T / temperature, len(images)
    q = (logits.softmax(1).diagonal() * logits.softmax(0).diagonal()).sqrt()
    return pi * n * q / (pi * n * q + 1 - pi)


def make_pairs(count: int, networks: int = 1) -> dict[str, torch.Tensor]:
    """Embeddings `(count, 8)` of unit length, those of several networks next to each other as a twin returns them."""
    torch.manual_seed(count)
    images = [F.normalize(torch.randn(count, 8, dtype=torch.float64), dim=-1) for _ in range(networks)]
    texts = [F.normalize(image + torch.randn(count, 8, dtype=torch.float64), dim=-1) for image in images]
    share = 1 if networks == 1 else 1 / math.sqrt(networks)
    return {"image_embeds": share * torch.cat(images, 1), "text_embeds": share * torch.cat(texts, 1)}


def make_ledger(objective: GscObjective) -> SampleLedger:
    ledger = SampleLedger(40, columns=objective.columns)
    ledger.write("y_cm", IDS[:4], torch.tensor([0.9, 0.2, 0.5, 1.0]))
    ledger.write("y_im", IDS[:4], torch.tensor([0.7, 0.8, 0.5, 0.0]))
    return ledger


LABELS = torch.tensor([0.7, 0.2, 0.5, 0.0, 1.0, 1.0])
SCALE, BIAS = torch.tensor(4.0), torch.tensor(0.0)


@pytest.mark.parametrize("way", ["with the loss", "with weights", "in the warm-up"])
@pytest.mark.parametrize(("count", "temperature", "pi"), [(6, 0.07, 0.5), (5, 0.4, 0.93), (1, 0.07, 0.3)])
def test_the_evidence_is_the_posterior_in_each_way_that_computes_it(count, temperature, pi, way):
    robust = GscObjective(temperature=temperature, warmup_epochs=1, **POSTERIOR)
    robust.channels[0].pi = pi
    objective, ledger, outputs = Objective("softmax", robust=robust), make_ledger(robust), make_pairs(count)
    objective.on_epoch_begin(0 if way == "in the warm-up" else 1)
    batch = {"sample_id": IDS[:count]}
    if way == "with weights":
        batch["pair_weight"] = torch.linspace(0, 2, count)
    objective.compute_loss(torch.nn.Identity(), batch, outputs, SCALE, BIAS, ledger)
    evidence = objective.compute_evidence(outputs, batch["sample_id"], ledger)
    expected = find_posterior(outputs["image_embeds"], outputs["text_embeds"], temperature, pi)
    torch.testing.assert_close(evidence["agreement"], expected)
    plain = Objective("softmax", robust=GscObjective(temperature=temperature))
    usual = plain.compute_evidence(outputs, batch["sample_id"], ledger)
    logits = outputs["text_embeds"] @ outputs["image_embeds"].T / temperature
    torch.testing.assert_close(usual["agreement"], (logits.softmax(1) + logits.softmax(0)).diagonal() / 2)

    objective.robust.record(batch["sample_id"], evidence, ledger)
    objective.robust.observe(objective.robust.summarize(evidence))
    torch.testing.assert_close(ledger.read("agreement", batch["sample_id"]), expected.float())
    assert robust.channels[0].pi == pi
    objective.begin_step()
    assert robust.channels[0].pi == pytest.approx(0.98 * pi + 0.02 * expected.mean().item(), rel=1e-9)
    objective.begin_step()  # nothing was seen: nothing moves
    assert robust.channels[0].pi == pytest.approx(0.98 * pi + 0.02 * expected.mean().item(), rel=1e-9)


def written_out_loss(images: torch.Tensor, texts: torch.Tensor, weights: torch.Tensor, gamma: float) -> torch.Tensor:
    """The loss of GSC with every matrix in full."""
    logits = texts @ images.T / 0.07
    across = -(logits.log_softmax(1).diagonal() + logits.log_softmax(0).diagonal()) / 2
    geometry = (images @ images.T * weights) @ (texts @ texts.T * weights).T
    return (weights * (across - gamma * geometry.log_softmax(1).diagonal())).mean()


@pytest.mark.parametrize("weighted", [False, True])
def test_the_squares_of_the_labels_weight_the_loss_and_mask_the_structures(weighted):
    robust = GscObjective(gamma=0.5, warmup_epochs=0, **POSTERIOR)
    objective, ledger, outputs = Objective("softmax", robust=robust), make_ledger(robust), make_pairs(6)
    given = torch.linspace(0, 2, 6) if weighted else torch.ones(6)
    batch = {"sample_id": IDS} | ({"pair_weight": given} if weighted else {})
    loss = objective.compute_loss(torch.nn.Identity(), batch, outputs, SCALE, BIAS, ledger)
    images, texts = outputs["image_embeds"], outputs["text_embeds"]
    squares = LABELS.double().square()
    torch.testing.assert_close(loss, written_out_loss(images, texts, squares * given, 0.5))
    structure = F.cosine_similarity(images @ images.T * squares, texts @ texts.T * squares)
    torch.testing.assert_close(objective.compute_evidence(outputs, IDS, ledger)["structure"], structure)
    torch.testing.assert_close(robust.opinion.matched, LABELS)
    torch.testing.assert_close(robust.opinion.weights, LABELS.square())


def test_a_matched_pair_among_many_has_a_small_probability_and_a_large_posterior():
    torch.manual_seed(0)
    count, matched = 512, torch.arange(512) % 5 < 2
    images = F.normalize(torch.randn(count, 64), dim=-1)
    shown = torch.where(matched[:, None], images, images.roll(7, 0))
    texts = F.normalize(0.42 * shown + 0.9 * F.normalize(torch.randn(count, 64), dim=-1), dim=-1)
    outputs, ids = {"image_embeds": images, "text_embeds": texts}, torch.arange(count)
    found = {}
    for evidence in ("probability", "posterior"):
        robust = GscObjective(evidence=evidence)
        ledger = SampleLedger(count, columns=robust.columns)
        for channel in robust.channels:
            channel.pi = 0.4
        found[evidence] = robust.compute_evidence(outputs, ids, ledger)["agreement"]
    assert found["probability"][matched].median() < 0.3 and found["posterior"][matched].median() > 0.9
    assert found["posterior"][~matched].median() < 0.1


def test_labels_are_an_opinion_after_the_warm_up():
    outputs = make_pairs(6)
    for weights in ({}, {"pair_weight": torch.linspace(0, 2, 6)}):
        robust = GscObjective(warmup_epochs=1)
        objective, ledger = Objective("softmax", robust=robust), make_ledger(robust)
        for epoch in (0, 1, 0):  # a second training begins with a warm-up
            objective.on_epoch_begin(epoch)
            objective.begin_step()
            objective.compute_loss(torch.nn.Identity(), {"sample_id": IDS, **weights}, outputs, SCALE, BIAS, ledger)
            if epoch == 0:
                assert robust.opinion is None
            else:
                torch.testing.assert_close(robust.opinion.matched, LABELS)
                torch.testing.assert_close(robust.opinion.weights, LABELS)


def test_each_of_two_networks_has_a_channel_of_its_own():
    robust = GscObjective(dual=True, warmup_epochs=0, **POSTERIOR)
    objective, ledger = Objective("softmax", robust=robust, num_networks=2), make_ledger(robust)
    robust.channels[0].pi, robust.channels[1].pi = 0.3, 0.8
    outputs, alone = make_pairs(6, networks=2), []
    for part in (slice(0, 8), slice(8, 16)):
        images, texts = (math.sqrt(2) * outputs[f"{side}_embeds"][:, part] for side in ("image", "text"))
        alone.append((images, texts))
    expected = [find_posterior(*embeds, 0.07, pi) for embeds, pi in zip(alone, (0.3, 0.8), strict=True)]
    for weights in ({}, {"pair_weight": torch.ones(6)}):
        both = SCALE.expand(2), BIAS.expand(2)
        objective.compute_loss(torch.nn.Identity(), {"sample_id": IDS, **weights}, outputs, *both, ledger)
        assert robust.opinion is None
        evidence = objective.compute_evidence(outputs, IDS, ledger)
        torch.testing.assert_close([evidence["agreement"], evidence["agreement_2"]], expected)
    objective.robust.record(IDS, evidence, ledger)
    objective.robust.observe(objective.robust.summarize(evidence))
    objective.begin_step()
    shares = [0.98 * pi + 0.02 * own.mean().item() for pi, own in zip((0.3, 0.8), expected, strict=True)]
    assert [channel.pi for channel in robust.channels] == pytest.approx(shares)
    assert robust.compute_figures() == {"estimated_mismatched": pytest.approx(1 - sum(shares) / 2)}
    assert robust.pop_logs() == {"selection_estimated_mismatched": pytest.approx(1 - sum(shares) / 2)}
    other = GscObjective(dual=True, **POSTERIOR)
    other.load_state_dict(json.loads(json.dumps(robust.state_dict())))
    assert other.state_dict() == robust.state_dict() and [channel.pi for channel in other.channels] != [0.5, 0.5]


def test_without_posteriors_there_is_no_state_and_no_estimate():
    robust = GscObjective()
    assert robust.channels == [] and robust.state_dict() == robust.compute_figures() == robust.pop_logs() == {}


# ---- in a run ----


def small_trainer(folder, model=None, **settings) -> DissectTrainer:
    family, processor = tiny_models.tiny_clip()
    defaults = dict(per_device_train_batch_size=16, num_train_epochs=3, learning_rate=1e-3, save_run_folder=False)
    defaults |= {"selection_strategy": "none", "gsc": POSTERIOR, "save_strategy": "no", "logging_steps": 2}
    return DissectTrainer(
        model=family if model is None else model,
        processing_class=processor,
        train_dataset=shuffle_captions(tiny_models.tiny_pairs(64), rate=0.25),
        args=DissectTrainingArguments(
            str(folder), use_cpu=True, report_to="none", disable_tqdm=True, **defaults | settings
        ),
    )


def state_of(trainer: DissectTrainer) -> dict[str, torch.Tensor]:
    columns = {name: trainer.ledger.column(name).clone() for name in trainer.ledger.columns}
    for number, state in enumerate(trainer.objective.state_dict()["channels"]):
        columns[f"channel {number}"] = torch.tensor([state["pi"], state["sum"], state["count"]], dtype=torch.float64)
    return columns | {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


def test_labels_follow_the_posteriors_whose_share_moves_with_each_step(tmp_path):
    """One step an epoch and weights that stay: labels and share follow from the same probabilities three times."""
    gsc = POSTERIOR | {"beta": 0.6, "temperature": 0.05}
    trainer = small_trainer(tmp_path, gsc=gsc, per_device_train_batch_size=64, learning_rate=0.0)
    trainer.train()
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(64)])
    with torch.no_grad():
        outputs = trainer.model(**{key: batch[key] for key in ("input_ids", "attention_mask", "pixel_values")})
    pi, label = 0.5, torch.ones(64)
    for epoch in range(3):
        posterior = find_posterior(outputs.image_embeds, outputs.text_embeds, 0.05, pi)
        if epoch < 2:  # the last evidence waits for the next epoch
            label = 0.6 * posterior + 0.4 * label
            pi = 0.98 * pi + 0.02 * posterior.mean().item()
    torch.testing.assert_close(trainer.ledger.column("y_cm"), label, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(trainer.ledger.column("agreement"), posterior, rtol=1e-4, atol=1e-5)
    assert trainer.objective.robust.channels[0].pi == pytest.approx(pi, rel=1e-5) and pi != 0.5


def test_micro_batches_of_a_step_share_one_estimate_that_moves_by_all_of_them(tmp_path):
    settings = dict(gradient_accumulation_steps=2, per_device_train_batch_size=32, learning_rate=0.0)
    trainer = small_trainer(tmp_path, num_train_epochs=2, **settings)
    trainer.train()
    assert trainer.state.global_step == 2
    second = trainer.ledger.column("agreement").double()  # posteriors of both micro-batches of the last step
    pi = trainer.objective.robust.channels[0].pi
    odds = second / (1 - second) * (1 - pi) / pi  # n q
    first = 0.5 * odds / (0.5 * odds + 0.5)
    batches_differ = 2e-3
    assert pi == pytest.approx(0.98 * 0.5 + 0.02 * first.mean().item(), abs=batches_differ) and pi != 0.5
    state = trainer.objective.robust.channels[0].state_dict()
    assert state["count"] == 64 and state["sum"] == pytest.approx(second.sum().item(), rel=1e-6)


RUNS = {
    "map, accumulation": (12, dict(gradient_accumulation_steps=2, dropout=0.1, max_steps=14)),
    "stream, two workers": (12, dict(stream=True, dataloader_num_workers=2)),
    "map, gradient caching, a bad row, in the warm-up": (4, dict(grad_cache_chunk_size=3, bad_row=True)),
    "with a strategy that weights": (12, dict(selection_strategy="info_batch", selection_ratio=0.75)),
}


@pytest.mark.parametrize("run", RUNS)
def test_a_resumed_run_is_the_uninterrupted_one(run, tmp_path):
    step, own = RUNS[run]
    settings = dict(selection_options=None, gsc=POSTERIOR, selection_strategy="none", record_selection=False)
    settings |= dict(save_steps=4, max_steps=18) | own
    whole = make_trainer(tmp_path, **settings)
    whole.train()
    found = state_of(whole)
    assert found["y_cm"].isfinite().sum() > 30 and found["channel 0"][0] != 0.5 and found["channel 0"][2] > 0
    resumed = make_trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    torch.testing.assert_close(state_of(resumed), found, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize(("before", "after"), [({}, POSTERIOR), (POSTERIOR, {})])
def test_a_checkpoint_of_the_other_evidence_is_resumed(before, after, tmp_path):
    settings = dict(save_strategy="steps", save_steps=6)
    small_trainer(tmp_path, gsc=before, **settings).train()
    resumed = small_trainer(tmp_path, gsc=after, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert resumed.state.global_step == 12 and resumed.ledger.column("y_cm").isfinite().all()
    assert len(resumed.objective.robust.channels) == len(after)


def test_gradient_caching_changes_nothing_but_the_memory(tmp_path):
    ends = []
    for chunk_size in (None, 3):
        settings = dict(optim="sgd", learning_rate=0.05, gradient_accumulation_steps=2)
        trainer = small_trainer(tmp_path, grad_cache_chunk_size=chunk_size, **settings)
        trainer.train()
        ends.append(state_of(trainer))
    torch.testing.assert_close(*ends, rtol=1e-3, atol=1e-4, equal_nan=True)


def test_repair_knows_the_mismatched_pairs_from_it(tmp_path):
    trainer = small_trainer(tmp_path, repair={}, num_train_epochs=6)
    trainer.train()
    shares = [entry.get("selection_repaired_share", 0) for entry in trainer.state.log_history if "loss" in entry]
    assert shares[0] == 0 < max(shares)  # not in the warm-up


def test_two_networks_train_and_resume(tmp_path):
    def trainer():
        twins = TwinDualEncoder.of(tiny_models.tiny_clip()[0], tiny_models.tiny_clip(seed=1)[0])
        return small_trainer(tmp_path, twins, gsc=POSTERIOR | {"dual": True}, save_strategy="steps", save_steps=5)

    whole = trainer()
    whole.train()
    found = state_of(whole)
    assert found["channel 0"][0] != found["channel 1"][0] and not found["y_cm"].equal(found["y_cm_2"])
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    torch.testing.assert_close(state_of(resumed), found, equal_nan=True, rtol=0, atol=0)


def test_the_estimate_is_logged_and_stands_in_figures_report_and_card(tmp_path):
    trainer = small_trainer(tmp_path, save_run_folder=True)
    trainer.train()
    logged = [entry["selection_estimated_mismatched"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 6 and logged[0] != logged[-1]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    estimate = metrics["selection"]["estimated_mismatched"]
    assert estimate == 1 - trainer.objective.robust.channels[0].pi and 0 <= metrics["selection"]["label_auroc"] <= 1
    report, card = ((tmp_path / name).read_text() for name in ("report.html", "README.md"))
    share = f"{100 * estimate:.1f} %"
    assert share in report and "posterior" in report
    assert f"| Mismatched pairs, as the run estimates | {share} |" in card
    assert '"evidence": "posterior"}' in card and "efron2001empirical" in card and "zhao2024gsc" in card


@pytest.mark.parametrize("strategy", ["gsc", "noisy_channel"])
def test_strategies_of_the_same_probabilities_are_refused(strategy):
    message = f"does not go with the strategy {strategy}, as its evidence is posterior"
    with pytest.raises(ValueError, match=rf"gsc={{.*}} {message}.*set evidence to probability"):
        DissectTrainingArguments("unused", gsc=POSTERIOR, selection_strategy=strategy)
    DissectTrainingArguments("unused", gsc={}, selection_strategy=strategy)
    overrides = [f"selection.strategy={strategy}", "selection.options={}", "training.num_train_epochs=3"]
    with pytest.raises(RecipeError, match=f"objective.gsc: {message}"):
        Recipe.load("quickstart", [*overrides, "objective.gsc.evidence=posterior"])


@pytest.mark.parametrize("value", ["Posterior", "", None, True, 1])
def test_another_evidence_is_named(value):
    message = "evidence=.* is not allowed; allowed: probability, posterior"
    for make in (GscObjective, lambda evidence: DissectTrainingArguments("unused", gsc={"evidence": evidence})):
        with pytest.raises(ValueError, match=message):
            make(evidence=value)


def test_a_recipe_sets_it():
    overrides = ["selection.strategy=none", "selection.options={}", "selection.mask_false_negatives=false"]
    recipe = Recipe.load("quickstart", [*overrides, "objective.gsc.evidence=posterior"])
    robust = DissectTrainingArguments(**recipe.training_arguments()).make_robust_objective()
    assert (robust.evidence, robust.beta, len(robust.channels)) == ("posterior", 0.7, 1)


# ---- several processes ----


def train_on_rank(steps: int = 3):
    """Train on the own part of ten pairs; return gradients of the last step, share and ledger."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model, batch = model_and_batch("tiny_clip")
    robust = GscObjective(warmup_epochs=1, gamma=0.5, temperature=0.2, **POSTERIOR)
    batch["sample_id"] = torch.arange(10) * 3
    size = 10 // world
    batch = {name: value[rank * size : (rank + 1) * size] for name, value in batch.items()}
    batch = {name: value for name, value in batch.items() if not name.endswith("_key")}
    model = DistributedDataParallel(model.train()) if world > 1 else model.train()
    objective = Objective("softmax", robust=robust)
    ledger, ranks = SampleLedger(40, columns=robust.columns), Ranks(Accelerator(cpu=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(steps):
        objective.on_epoch_begin(step)
        if step:
            objective.update(ledger)
        objective.begin_step()
        optimizer.zero_grad()
        outputs = model(**forward_inputs(model, batch))
        scale, bias = logit_scale_and_bias(model)
        objective.compute_loss(model, batch, outputs, scale, bias, ledger).backward()
        evidence = objective.compute_evidence(outputs, batch["sample_id"], ledger)
        columns = ranks.gather_columns({"sample_id": batch["sample_id"], **evidence}, [size] * world)
        objective.robust.record(columns["sample_id"], columns, ledger)
        objective.robust.observe(ranks.add_up(objective.robust.summarize(evidence)))
        optimizer.step()
    objective.begin_step()
    shares = ranks.gather(torch.tensor([robust.channels[0].pi], dtype=torch.float64))
    assert (shares == shares[0]).all() and shares[0] != 0.5
    found = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
    return found | {"pi": shares[:1]} | {name: ledger.column(name).clone() for name in ledger.columns}


def test_two_processes_train_like_one_on_the_union(tmp_path):
    together = on_ranks([2], tmp_path, train_on_rank)[2]
    alone = train_on_rank()
    assert np.isfinite(alone["y_cm"][torch.arange(10) * 3].numpy()).all()
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6, equal_nan=True)
