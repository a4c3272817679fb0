"""Training with the weights of the noisy channel: the loss, the estimated share, and what a run keeps of both."""

import json
import math

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

from hf_dissect import DissectTrainer, DissectTrainingArguments, TwinDualEncoder
from hf_dissect.data import shuffle_captions
from hf_dissect.data.model_inputs import forward_inputs
from hf_dissect.distributed import Ranks
from hf_dissect.losses.noisy_channel import NoisyChannel
from hf_dissect.models.loading import logit_scale_and_bias
from hf_dissect.objective import Objective
from hf_dissect.objectives.noisy_channel import NoisyChannelObjective
from hf_dissect.selection import SampleLedger

KEYS = {"image_key": torch.tensor([1, 1, 2, 3, 4, 5]), "caption_key": torch.tensor([1, 2, 3, 4, 4, 6])}
IDS = torch.tensor([3, 9, 4, 1, 30, 22])


def written_out(kind: str, texts, images, scale, bias, pi: float, given, masked: bool, smoothing: float, tau=1.0):
    """The weighted loss with every matrix in full, and the evidence of the pairs."""
    logits, own = texts @ images.T * scale + bias, torch.eye(len(texts), dtype=torch.bool)
    excluded = torch.zeros_like(own)
    if masked:
        excluded = (KEYS["image_key"][:, None] == KEYS["image_key"]) | (
            KEYS["caption_key"][:, None] == KEYS["caption_key"]
        )
        excluded &= ~own
    count = (~excluded).sum(1)
    kept = logits.masked_fill(excluded, -math.inf)
    losses = -(kept.log_softmax(1).diagonal() + kept.log_softmax(0).diagonal()) / 2
    tempered = (tau * kept).detach()
    ratio = count * torch.exp((tempered.log_softmax(1).diagonal() + tempered.log_softmax(0).diagonal()) / 2)
    if smoothing:
        above = (ratio - smoothing) / (1 - smoothing)
        ratio = torch.where(ratio > 2 * smoothing, above, ratio / (2 * (1 - smoothing))).clamp_max(count)
    q = ratio / count
    posterior = pi * q / (pi * q + (1 - pi) / count)
    weights = posterior.square()
    if kind == "softmax":
        uniform = -sum(kept.log_softmax(way).masked_fill(excluded, 0).sum(way) / count for way in (0, 1)) / 2
        losses = weights * ((1 - smoothing) * losses + smoothing * uniform)
    else:
        of_strangers = F.softplus(logits).masked_fill(excluded | own, 0).sum(1)
        losses = weights * F.softplus(-logits.diagonal()) + of_strangers
    return (given * losses).mean(), posterior, ((count - 1) * q / (1 - q)).log()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("with_logits", [False, True])
@pytest.mark.parametrize("tau", [1.0, 0.2])
@pytest.mark.parametrize(("kind", "smoothing"), [("softmax", 0.0), ("softmax", 0.3), ("sigmoid", 0.0)])
def test_the_loss_weights_each_pair_by_its_posterior_squared(kind, smoothing, tau, with_logits, weighted, masked):
    torch.manual_seed(1)
    images, texts = (F.normalize(torch.randn(6, 8, dtype=torch.float64), dim=-1).requires_grad_() for _ in range(2))
    scale, bias = (torch.tensor(value, dtype=torch.float64) for value in (4.0, -1.5 if kind == "sigmoid" else 0.0))
    robust, ledger = NoisyChannelObjective(smoothing), SampleLedger(40, columns=NoisyChannelObjective.columns)
    robust.channel.pi, robust.channel.temperature.value = 0.7, tau
    objective = Objective(kind, mask_false_negatives=masked, robust=robust)
    batch = {"sample_id": IDS, **(KEYS if masked else {})}
    given = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0, 3.0], dtype=torch.float64) if weighted else torch.ones(6)
    if weighted:
        batch["pair_weight"] = given
    outputs = {"image_embeds": images, "text_embeds": texts}
    if with_logits:
        outputs["logits_per_text"] = texts @ images.T * scale + bias
    loss = objective.compute_loss(torch.nn.Identity(), batch, outputs, scale, bias, ledger)
    expected, posterior, evidence = written_out(kind, texts, images, scale, bias, 0.7, given, masked, smoothing, tau)
    torch.testing.assert_close(loss, expected)
    for got, wanted in zip(
        torch.autograd.grad(loss, (images, texts)), torch.autograd.grad(expected, (images, texts)), strict=True
    ):
        torch.testing.assert_close(got, wanted)

    columns = objective.compute_evidence(outputs, IDS, ledger)
    torch.testing.assert_close(columns["posterior"], posterior.float())
    torch.testing.assert_close(columns["evidence"], evidence.float(), rtol=1e-4, atol=1e-4)
    objective.robust.record(IDS, columns, ledger)
    objective.robust.observe(objective.robust.summarize(columns))
    torch.testing.assert_close(ledger.read("evidence", IDS), evidence.float(), rtol=1e-4, atol=1e-4)
    assert robust.channel.pi == 0.7
    objective.begin_step()
    assert robust.channel.pi == pytest.approx(0.98 * 0.7 + 0.02 * posterior.mean().item(), rel=1e-6)


# ---- in a run ----

SMALL = {"selection_options": None, "selection_strategy": "none", "noisy_channel": {}, "record_selection": False}


def state_of(trainer: DissectTrainer) -> dict[str, torch.Tensor]:
    columns = {name: trainer.ledger.column(name).clone() for name in trainer.ledger.columns}
    channel = trainer.objective.state_dict()
    temperature = channel.pop("temperature")
    columns["channel"] = torch.tensor(list(channel.values()), dtype=torch.float64)
    columns |= {name: torch.tensor(value, dtype=torch.float64) for name, value in temperature.items()}
    return columns | {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


def make_over_confident(model: torch.nn.Module, channel: NoisyChannel) -> None:
    """Set the logit scale to 100, and let the channel have seen steps in which small factors were the likeliest."""
    model.logit_scale.data.fill_(math.log(100))
    state = channel.temperature.state_dict()
    channel.temperature.load_state_dict(state | {"likelihoods": state["likelihoods"][:-1] + [9.0]})


RUNS = {
    "map, accumulation": dict(gradient_accumulation_steps=2, dropout=0.1),
    "stream, two workers": dict(stream=True, dataloader_num_workers=2),
    "map, gradient caching, a bad row": dict(grad_cache_chunk_size=3, bad_row=True),
    "over-confident": dict(gradient_accumulation_steps=2, logging_steps=2),
    "with a strategy": dict(selection_strategy="random", mask_false_negatives=True),
}


@pytest.mark.parametrize("run", RUNS)
def test_a_resumed_run_is_the_uninterrupted_one(run, tmp_path):
    settings = dict(SMALL, save_steps=5, max_steps=12, **RUNS[run])
    whole = make_trainer(tmp_path, **settings)
    if run == "over-confident":
        make_over_confident(whole.model, whole.objective.robust.channel)
    whole.train()
    state = state_of(whole)
    logged = [entry.get("selection_evidence_temperature") for entry in whole.state.log_history if "loss" in entry]
    assert (min(logged) < 1) if run == "over-confident" else (state["value"] == 1 and not any(logged))
    assert state["evidence"].isfinite().sum() > 30 and state["channel"][2] > 0
    resumed = make_trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    torch.testing.assert_close(state_of(resumed), state, equal_nan=True, rtol=0, atol=0)


def small_trainer(folder, model=None, **settings) -> DissectTrainer:
    family, processor = tiny_models.tiny_clip()
    defaults = dict(per_device_train_batch_size=16, num_train_epochs=3, learning_rate=1e-3, save_run_folder=False)
    defaults |= {"selection_strategy": "none", "noisy_channel": {}, "save_strategy": "no", "logging_steps": 2}
    return DissectTrainer(
        model=family if model is None else model,
        processing_class=processor,
        train_dataset=shuffle_captions(tiny_models.tiny_pairs(64), rate=0.25),
        args=DissectTrainingArguments(
            str(folder), use_cpu=True, report_to="none", disable_tqdm=True, **defaults | settings
        ),
    )


def test_gradient_caching_changes_nothing_but_the_memory(tmp_path):
    ends = []
    for chunk_size in (None, 3):
        settings = dict(optim="sgd", learning_rate=0.05, gradient_accumulation_steps=2)
        trainer = small_trainer(tmp_path, grad_cache_chunk_size=chunk_size, **settings)
        trainer.train()
        ends.append(state_of(trainer))
    torch.testing.assert_close(*ends, rtol=1e-3, atol=1e-4)


def test_micro_batches_of_a_step_share_one_estimate_that_moves_by_all_of_them(tmp_path):
    """Two steps of two micro-batches with weights that stay: the shares follow from the evidence of all 64 pairs."""
    settings = dict(gradient_accumulation_steps=2, per_device_train_batch_size=32, learning_rate=0.0)
    trainer = small_trainer(tmp_path, num_train_epochs=3, **settings)
    trainer.train()
    odds = trainer.ledger.column("evidence").double().exp()  # of the last step, whose batches are as large as others
    q = odds / (odds + 31)
    assert trainer.state.global_step == 3
    batches_differ = 2e-3  # the strangers of a pair are others in each epoch
    pi = 0.5
    for _ in range(2):
        pi = 0.98 * pi + 0.02 * (pi * q / (pi * q + (1 - pi) / 32)).mean().item()
    assert trainer.objective.robust.channel.pi == pytest.approx(pi, abs=batches_differ)
    assert trainer.objective.robust.channel.pi != 0.5


@pytest.mark.parametrize("model", ["tiny_siglip", "tiny_dual_encoder", "lora", "mola"])
def test_other_models_train(model, tmp_path):
    if model in ("lora", "mola"):
        network = getattr(tiny_models, f"with_{model}")(tiny_models.tiny_clip()[0])
        trainer = small_trainer(tmp_path, network)
    else:
        network, processor = getattr(tiny_models, model)()
        trainer = small_trainer(tmp_path / "unused")
        args = DissectTrainingArguments(str(tmp_path), **{**SMALL, "max_steps": 4, "use_cpu": True})
        args.save_run_folder, args.disable_tqdm, args.per_device_train_batch_size = False, True, 16
        rows = tiny_models.tiny_pairs(64)
        trainer = DissectTrainer(network, args, processing_class=processor, train_dataset=rows)
    before = torch.cat([weight.detach().flatten().clone() for weight in network.parameters() if weight.requires_grad])
    trainer.train()
    after = torch.cat([weight.detach().flatten() for weight in network.parameters() if weight.requires_grad])
    assert not after.equal(before) and after.isfinite().all()
    assert trainer.ledger.column("evidence").isfinite().all() and trainer.objective.robust.channel.pi != 0.5


def test_two_networks_are_refused(tmp_path):
    twins = TwinDualEncoder.of(tiny_models.tiny_clip()[0], tiny_models.tiny_clip(seed=1)[0])
    with pytest.raises(ValueError, match="noisy_channel: the model consists of two networks.*give one of them"):
        small_trainer(tmp_path, twins)


def test_the_estimate_is_logged_and_stands_in_figures_report_and_card(tmp_path):
    trainer = small_trainer(tmp_path, save_run_folder=True)
    trainer.train()
    logged = [entry["selection_estimated_mismatched"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 6 and logged[0] != logged[-1]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["selection"]["estimated_mismatched"] == 1 - trainer.objective.robust.channel.pi
    assert 0 <= metrics["selection"]["evidence_auroc"] <= 1
    share = f"{100 * metrics['selection']['estimated_mismatched']:.1f} %"
    report, card = ((tmp_path / name).read_text() for name in ("report.html", "README.md"))
    assert "Mismatched, estimated over optimiser steps" in report and share in report
    assert f"| Mismatched pairs, as the run estimates | {share} |" in card
    assert '| Weights of the noisy channel | {"smoothing": 0.0} |' in card and "efron2001empirical" in card


# ---- several processes ----


def train_on_rank(steps: int = 3):
    """Train on the own part of ten pairs; return gradients of the last step, share and ledger."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    found = {}
    for family in ("tiny_clip", "tiny_siglip"):
        model, batch = model_and_batch(family)
        make_over_confident(model, (robust := NoisyChannelObjective()).channel)
        batch["sample_id"] = torch.arange(10) * 3
        size = 10 // world
        batch = {name: value[rank * size : (rank + 1) * size] for name, value in batch.items()}
        model = DistributedDataParallel(model.train()) if world > 1 else model.train()
        kind = "softmax" if family == "tiny_clip" else "sigmoid"
        objective = Objective(kind, mask_false_negatives=True, robust=robust)
        ledger, ranks = SampleLedger(40, columns=("evidence",)), Ranks(Accelerator(cpu=True))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(steps):
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
        found[family] = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
        temperature = objective.robust.channel.temperature
        found[family] |= {"pi": torch.tensor(objective.robust.channel.pi), "evidence": ledger.column("evidence")}
        found[family]["temperature"] = torch.tensor(temperature.value)
        assert temperature.pop_lowest() < 0.5
        shares = ranks.gather(torch.tensor([objective.robust.channel.pi], dtype=torch.float64))
        assert (shares == shares[0]).all()
    return found


def test_two_processes_train_like_one_on_the_union(tmp_path):
    together = on_ranks([2], tmp_path, train_on_rank)[2]
    torch.testing.assert_close(together, train_on_rank(), rtol=1e-5, atol=1e-7, equal_nan=True)
