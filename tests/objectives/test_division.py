"""NCR's division as weights of all pairs, and as an opinion about them."""

import json
import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.mixture import GaussianMixture
from testing import tiny_models
from testing.cached_steps import model_and_batch
from testing.faulty_run import make_trainer
from testing.launched import on_ranks
from torch.nn.parallel import DistributedDataParallel
from transformers import HfArgumentParser

from hf_dissect import DissectTrainer, DissectTrainingArguments, Recipe, TwinDualEncoder
from hf_dissect.data import shuffle_captions
from hf_dissect.data.model_inputs import forward_inputs
from hf_dissect.models.loading import logit_scale_and_bias
from hf_dissect.objective import Objective
from hf_dissect.objectives.division import DivisionObjective
from hf_dissect.recipe.fields import RecipeError
from hf_dissect.recipe.objective_schema import DivisionSection
from hf_dissect.selection import SampleLedger

KEYS = {"image_key": torch.tensor([1, 1, 2, 3, 4, 5]), "caption_key": torch.tensor([1, 2, 3, 4, 4, 6])}
IDS = torch.tensor([3, 9, 4, 1, 30, 22])
CASES = {  # probabilities in the ledger, and the weights that follow
    "all known": ([0.9, 0.0, 1.0, 0.25, 0.5, 0.125], [0.9, 0.0, 1.0, 0.25, 0.5, 0.125]),
    "some unknown": ([0.9, math.nan, 0.0, 0.25, math.nan, math.nan], [0.9, 0.25, 0.0, 0.25, 0.25, 0.25]),
    "one known": ([math.nan] * 5 + [0.0], [0.0] * 6),
    "none known": ([math.nan] * 6, None),
}


def written_out(kind: str, texts, images, scale, bias, masked: bool) -> torch.Tensor:
    """The contrastive loss of each pair with every matrix in full."""
    logits, own = texts @ images.T * scale + bias, torch.eye(len(texts), dtype=torch.bool)
    excluded = torch.zeros_like(own)
    if masked:
        excluded = (KEYS["image_key"][:, None] == KEYS["image_key"]) & ~own
        excluded |= (KEYS["caption_key"][:, None] == KEYS["caption_key"]) & ~own
    if kind == "softmax":
        kept = logits.masked_fill(excluded, -math.inf)
        return -(kept.log_softmax(1).diagonal() + kept.log_softmax(0).diagonal()) / 2
    of_strangers = F.softplus(logits).masked_fill(excluded | own, 0).sum(1)
    return F.softplus(-logits.diagonal()) + of_strangers


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_the_loss_weights_each_pair_by_its_probability_of_being_clean(kind, case, weighted, masked):
    torch.manual_seed(1)
    images, texts = (F.normalize(torch.randn(6, 8, dtype=torch.float64), dim=-1).requires_grad_() for _ in range(2))
    scale, bias = (torch.tensor(value, dtype=torch.float64) for value in (4.0, -1.5 if kind == "sigmoid" else 0.0))
    ledger, robust = SampleLedger(40, columns=("loss", "p_clean")), DivisionObjective()
    ledger.write("p_clean", IDS, torch.tensor(CASES[case][0]))
    ledger.write("p_clean", torch.tensor([7]), torch.tensor([0.625]))  # of a pair of another batch
    objective = Objective(kind, mask_false_negatives=masked, robust=robust)
    batch = {"sample_id": IDS, **(KEYS if masked else {})}
    given = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0, 3.0])
    if weighted:
        batch["pair_weight"] = given
    outputs = {"image_embeds": images, "text_embeds": texts}
    losses = written_out(kind, texts, images, scale, bias, masked)
    losses = losses * given if weighted else losses
    torch.testing.assert_close(  # in the warm-up
        objective.compute_loss(torch.nn.Identity(), batch, outputs, scale, bias, ledger), losses.mean()
    )
    assert robust.opinion is None
    objective.on_epoch_begin(1)
    objective.begin_step()
    loss = objective.compute_loss(torch.nn.Identity(), batch, outputs, scale, bias, ledger)
    weights = CASES[case][1]
    expected = (losses * (1 if weights is None else torch.tensor(weights))).mean()
    torch.testing.assert_close(loss, expected)
    for got, wanted in zip(
        torch.autograd.grad(loss, (images, texts), retain_graph=True),
        torch.autograd.grad(expected, (images, texts)),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted)
    if weights is None:
        assert robust.opinion is None
    else:
        assert robust.opinion.matched.equal(torch.tensor(weights)) and robust.opinion.weights.equal(
            torch.tensor(weights)
        )
    objective.begin_step()
    assert robust.opinion is None and objective.compute_evidence(outputs, IDS, ledger) == {}


def test_another_strategy_in_python_is_named():
    objective = Objective("softmax", robust=DivisionObjective(warmup_epochs=0))
    outputs = {"image_embeds": torch.eye(6), "text_embeds": torch.eye(6)}
    ledger = SampleLedger(40, columns=("correlation",))
    with pytest.raises(ValueError, match="division: the ledger has no column p_clean, which the strategy ncr writes"):
        objective.compute_loss(
            torch.nn.Identity(), {"sample_id": IDS}, outputs, torch.tensor(1.0), torch.tensor(0.0), ledger
        )


# ---- in a run ----

NCR = {"selection_strategy": "ncr", "selection_ratio": 1.0, "selection_options": None, "division": {}}


def small_trainer(folder, model=None, **settings) -> DissectTrainer:
    family, processor = tiny_models.tiny_clip()
    defaults = dict(per_device_train_batch_size=16, num_train_epochs=3, learning_rate=1e-3, save_run_folder=False)
    defaults |= NCR | {"save_strategy": "no", "logging_steps": 1}
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
    return columns | {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


@pytest.mark.parametrize("warmup", [1, 2])
def test_a_ratio_of_one_divides_all_pairs_and_trains_on_all_of_them(warmup, tmp_path):
    """One step an epoch and weights that stay: division and loss of each epoch follow from the first losses."""
    settings = dict(per_device_train_batch_size=64, num_train_epochs=4, learning_rate=0.0)
    trainer = small_trainer(tmp_path, selection_warmup_epochs=warmup, **settings)
    trainer.train()
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(64)])
    with torch.no_grad():
        logits = trainer.model(**forward_inputs(trainer.model, batch)).logits_per_text
    losses = -(logits.log_softmax(1).diagonal() + logits.log_softmax(0).diagonal()).double() / 2
    scaled = ((losses - losses.min()) / (losses.max() - losses.min()))[:, None].numpy()
    mixture = GaussianMixture(2, max_iter=10, tol=1e-2, reg_covar=5e-4, random_state=0).fit(scaled)
    p_clean = torch.from_numpy(mixture.predict_proba(scaled)[:, mixture.means_.argmin()])
    found = trainer.ledger.column("p_clean").double()
    torch.testing.assert_close(found, p_clean, rtol=1e-2, atol=1e-3)
    assert 0.05 < found.mean() < 0.95 and found.unique().numel() > 10
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    expected = [losses.mean().item()] * warmup + [(found * losses).mean().item()] * (4 - warmup)
    assert logged == pytest.approx(expected, rel=1e-4)
    assert trainer.monitor.run.figures()["kept_share"] == 1.0
    assert trainer.objective.robust.warmup_epochs == warmup
    assert trainer.objective.robust.opinion.matched.sort().values.equal(found.float().sort().values)


RUNS = {
    "map, accumulation": (6, dict(gradient_accumulation_steps=2, dropout=0.1, max_steps=10)),
    "stream, two workers": (12, dict(stream=True, dataloader_num_workers=2)),
    "map, gradient caching, a bad row, in the warm-up": (6, dict(grad_cache_chunk_size=3, bad_row=True)),
    "masks, from the ledger": (12, dict(mask_false_negatives=True, selection_rescore_every=4, max_steps=28)),
}


@pytest.mark.parametrize("run", RUNS)
def test_a_resumed_run_is_the_uninterrupted_one(run, tmp_path):
    step, own = RUNS[run]
    settings = NCR | dict(save_steps=6, max_steps=18) | own
    whole = make_trainer(tmp_path, **settings)
    whole.train()
    state = state_of(whole)
    assert state["loss"].isfinite().sum() >= 8  # those of the last epoch, which is not over
    assert state["p_clean"].isfinite().sum() > 60 and state["p_clean"].nan_to_num().unique().numel() > 10
    resumed = make_trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    torch.testing.assert_close(state_of(resumed), state, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("model", ["tiny_siglip", "lora", "mola"])
def test_other_models_train(model, tmp_path):
    if model == "tiny_siglip":
        network, processor = tiny_models.tiny_siglip()
        settings = NCR | dict(num_train_epochs=3, per_device_train_batch_size=16, save_run_folder=False, use_cpu=True)
        args = DissectTrainingArguments(str(tmp_path), **settings, disable_tqdm=True, save_strategy="no")
        trainer = DissectTrainer(network, args, processing_class=processor, train_dataset=tiny_models.tiny_pairs(64))
    else:
        trainer = small_trainer(tmp_path, getattr(tiny_models, f"with_{model}")(tiny_models.tiny_clip()[0]))
    trainer.train()
    assert trainer.ledger.column("p_clean").isfinite().all() and trainer.objective.robust.opinion is not None
    assert all(weight.isfinite().all() for weight in trainer.model.parameters())


def test_repair_knows_the_mismatched_pairs_from_it(tmp_path):
    trainer = small_trainer(tmp_path, repair={}, num_train_epochs=6)
    trainer.train()
    shares = [entry.get("selection_repaired_share", 0) for entry in trainer.state.log_history if "loss" in entry]
    assert max(shares[:4]) == 0 < max(shares)
    with pytest.raises(ValueError, match="division={} does not go with the strategy none"):
        small_trainer(tmp_path, repair={}, selection_strategy="none")


def test_two_networks_are_refused(tmp_path):
    twins = TwinDualEncoder.of(tiny_models.tiny_clip()[0], tiny_models.tiny_clip(seed=1)[0])
    with pytest.raises(ValueError, match="division: the model consists of two networks.*give one of them"):
        small_trainer(tmp_path, twins)


def test_metrics_report_and_card_show_it(tmp_path):
    trainer = small_trainer(tmp_path, save_run_folder=True)
    trainer.train()
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["settings"]["division"] == {} and 0 <= metrics["selection"]["p_clean_auroc"] <= 1
    report, card = ((tmp_path / name).read_text() for name in ("report.html", "README.md"))
    assert "| Weights of NCR's division | yes |" in card and "huang2021ncr" in card and "division" in report
    plain = small_trainer(tmp_path / "plain", save_run_folder=True, division=None)
    plain.train()
    assert "division" not in json.loads((tmp_path / "plain" / "metrics.json").read_text())["settings"]
    assert "Weights of NCR's division" not in (tmp_path / "plain" / "README.md").read_text()


# ---- its settings ----


@pytest.mark.parametrize(
    ("strategy", "ratio"), [("ncr", 0.5), ("ncr", 0.99), ("none", 1.0), ("small_loss", 1.0), ("dissect", 0.5)]
)
def test_another_selection_is_refused_in_the_same_words(strategy, ratio):
    message = (
        f"does not go with the strategy {strategy} and a ratio of {ratio:g}: its weights are the division of the "
        "strategy ncr, .*; take this strategy and a ratio of 1, or set the objective to null"
    )
    with pytest.raises(ValueError, match=f"division={{}} {message}"):
        DissectTrainingArguments("unused", selection_strategy=strategy, selection_ratio=ratio, division={})
    overrides = [f"selection.strategy={strategy}", f"selection.ratio={ratio}", "selection.options={}"]
    overrides += ["training.num_train_epochs=3", "selection.warmup_epochs=1"]
    Recipe.load("quickstart", overrides)
    with pytest.raises(RecipeError, match=f"objective.division: {message}"):
        Recipe.load("quickstart", [*overrides, "objective.division={}"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"division": {"beta": 1}}, "division={'beta': 1}: 'beta' is not a setting of it; allowed: none"),
        ({"division": True}, "division=True: must be a dict, or JSON of one, such as {}"),
        ({"division": "yes"}, "division='yes': must be a dict, or JSON of one, such as {}"),
        ({"division": {}, "rince": {}}, "division={} does not go with rince: each replaces the contrastive loss"),
        ({"division": {}, "gsc": {}}, "does not go with gsc"),
        ({"division": {}, "noisy_channel": {}}, "does not go with noisy_channel"),
        ({"division": {}, "selection_warmup_epochs": 3}, "selection_warmup_epochs=3 leaves nothing to select"),
        ({"division": {}, "selection_warmup_epochs": 0}, "warmup_epochs=0: ncr needs at least 1"),
    ],
)
def test_impossible_settings_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        DissectTrainingArguments("unused", **NCR | {"num_train_epochs": 3} | given)


def test_a_recipe_sets_it_and_survives_a_round_trip(tmp_path):
    overrides = ["selection.strategy=ncr", "selection.ratio=1", "selection.options={}", "selection.warmup_epochs=1"]
    recipe = Recipe.load("quickstart", [*overrides, "objective.division={}"])
    assert recipe.objective.division == DivisionSection()
    recipe.save(tmp_path / "recipe.yaml")
    loaded = Recipe.load(tmp_path / "recipe.yaml")
    assert loaded == recipe and loaded.training_arguments()["division"] == {}
    robust = DissectTrainingArguments(**loaded.training_arguments()).make_robust_objective()
    assert (robust.name, robust.warmup_epochs) == ("division", 1)
    assert loaded.with_overrides(["objective.division=null"]).objective.division is None
    for wrong, fault in (
        ("objective.division.beta=1", r"objective.division.beta: unknown key \(value 1\); allowed: none"),
        ("objective.division=true", "objective.division: True is not allowed; allowed: a mapping of settings"),
    ):
        with pytest.raises(RecipeError, match=fault):
            Recipe.load("quickstart", [*overrides, wrong])


def test_the_command_line_of_transformers_knows_it():
    words = "--output_dir unused --selection_strategy ncr --selection_ratio 1 --division {}".split()
    (args,) = HfArgumentParser(DissectTrainingArguments).parse_args_into_dataclasses(words)
    assert args.division == {} and args.make_robust_objective().name == "division"
    args = DissectTrainingArguments("unused", **NCR | {"selection_options": {"warmup_epochs": 2}})
    assert args.make_robust_objective().warmup_epochs == 2


# ---- several processes ----


def compute_on_rank():
    """Compute gradients of the own part of ten pairs, some of them without a probability on one rank only."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    found = {}
    for family, kind in (("tiny_clip", "softmax"), ("tiny_siglip", "sigmoid")):
        model, batch = model_and_batch(family)
        ids = batch["sample_id"] = torch.arange(10) * 3
        size = 10 // world
        batch = {name: value[rank * size : (rank + 1) * size] for name, value in batch.items()}
        model = DistributedDataParallel(model.train()) if world > 1 else model.train()
        ledger = SampleLedger(40, columns=("p_clean",))
        ledger.write("p_clean", ids[5:9], torch.tensor([0.1, 0.5, 0.9, 0.3]))  # the first five have none
        objective = Objective(kind, mask_false_negatives=True, robust=DivisionObjective(warmup_epochs=0))
        outputs = model(**forward_inputs(model, batch))
        scale, bias = logit_scale_and_bias(model)
        objective.compute_loss(model, batch, outputs, scale, bias, ledger).backward()
        expected = torch.tensor([0.3] * 5 + [0.1, 0.5, 0.9, 0.3, 0.3])[rank * size : (rank + 1) * size]
        assert objective.robust.opinion.matched.equal(expected)
        found[family] = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
    return found


def test_two_processes_train_like_one_on_the_union(tmp_path):
    together = on_ranks([2], tmp_path, compute_on_rank)[2]
    torch.testing.assert_close(together, compute_on_rank(), rtol=1e-4, atol=1e-6)
