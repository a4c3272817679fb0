"""Repair of mismatched pairs: the loss against a formula written out, and what runs keep of it."""

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
from testing.feature_pairs import make_feature_pairs
from testing.launched import on_ranks
from torch.nn.parallel import DistributedDataParallel

from hf_dissect import DissectTrainer, DissectTrainingArguments, Recipe
from hf_dissect.data import shuffle_captions
from hf_dissect.data.model_inputs import forward_inputs
from hf_dissect.distributed import Ranks
from hf_dissect.losses.soft_targets import soft_target_losses
from hf_dissect.models.from_scratch import build_model_and_processor
from hf_dissect.models.loading import logit_scale_and_bias
from hf_dissect.objective import Objective
from hf_dissect.objectives.image_space import AverageSpace, ImageSpace, StoredSpace
from hf_dissect.objectives.noisy_channel import NoisyChannelObjective
from hf_dissect.objectives.repair import Repair
from hf_dissect.selection import CandidateScores, SampleLedger, make_strategy
from hf_dissect.selection.inclusion import find_inclusion
from hf_dissect.selection.opinion import Opinion


def unit(*shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def written_out(repair, progress, texts, images, scale, opinion, ids, image_keys, factors, memory):
    """The loss pair by pair, with a memory of (id, image key, trust, caption, image)."""
    strength = min(max((progress - 1 / 8) / (1 / 2), 0), 1) * repair.strength
    mean = torch.stack([image for *_, image in memory]).mean(0)
    doubt = [1.0 if repair.all_pairs else 1 - float(p) for p in opinion.matched]
    doubt = [(d if d >= 0.05 else 0.0) * float(f) for d, f in zip(doubt, factors, strict=True)]
    strength *= min(1, float((opinion.weights * factors).sum()) / sum(doubt))
    vectors = [F.normalize(image.detach() - mean, dim=0) for image in images]
    total = 0
    for i in range(len(texts)):
        others = [entry for entry in memory if entry[0] != ids[i] and entry[1] != image_keys[i]]
        near = sorted(others, key=lambda entry: -float(entry[3] @ texts[i]))[: repair.neighbours]
        found = F.normalize(sum(trust * F.normalize(image - mean, dim=0) for _, _, trust, _, image in near), dim=0)
        cosines = torch.stack([found @ vector for vector in vectors])
        target = (3.5 * cosines / cosines.std()).softmax(0)
        loss = -(target * (scale * images @ texts[i]).log_softmax(0)).sum()
        if repair.side == "both":
            near = sorted(others, key=lambda entry: -float(F.normalize(entry[4] - mean, dim=0) @ vectors[i]))
            found = F.normalize(sum(trust * caption for _, _, trust, caption, _ in near[: repair.neighbours]), dim=0)
            target = (4 * scale * texts.detach() @ found).softmax(0)
            loss = (loss - (target * (scale * texts @ images[i]).log_softmax(0)).sum()) / 2
        total = total + strength * doubt[i] * loss / len(texts)
    return total


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("side", "all_pairs"), [("caption", False), ("both", False), ("caption", True)])
@pytest.mark.parametrize("progress", [0.3, 0.9])
def test_the_loss_is_that_of_the_formula(side, all_pairs, weighted, progress):
    torch.manual_seed(2)
    repair = Repair(side=side, all_pairs=all_pairs, memory=64, neighbours=3)
    stored, images_stored, trust = unit(20, 6), unit(20, 6), torch.rand(20, dtype=torch.float64) * 0.3 + 0.7
    keys = torch.stack([torch.arange(20), torch.arange(20) // 2])
    repair.pairs.add(stored, images_stored, trust, keys, trust > 0)
    memory = [(n, n // 2, float(trust[n]), stored[n], images_stored[n]) for n in range(20)]
    texts, images = unit(7, 6).requires_grad_(), unit(7, 6).requires_grad_()
    matched = torch.tensor([0.1, 0.98, 0.5, 0.7, 0.9, 0.0, 0.3], dtype=torch.float64)
    opinion = Opinion(matched, matched**2)
    ids, image_keys = [3, 40, 41, 42, 5, 43, 44], [1, 2, 30, 31, 9, 3, 30]
    batch = {"sample_id": torch.tensor(ids), "image_key": torch.tensor(image_keys)}
    factors = torch.tensor([1.0, 2.0, 0.0, 1.5, 1.0, 0.5, 1.0]) if weighted else torch.ones(7)
    if weighted:
        batch["pair_weight"] = factors
    outputs, scale = {"text_embeds": texts, "image_embeds": images}, torch.tensor(5.0, dtype=torch.float64)
    expected = written_out(repair, progress, texts, images, scale, opinion, ids, image_keys, factors, memory)
    repair.begin_step(progress)
    scale.requires_grad_()
    loss = repair.compute_loss(torch.nn.Identity(), batch, outputs, scale, opinion)
    torch.testing.assert_close(loss, expected)
    for got, wanted in zip(
        torch.autograd.grad(loss, (texts, images)), torch.autograd.grad(expected, (texts, images)), strict=True
    ):
        torch.testing.assert_close(got, wanted)
    state = repair.pairs.state_dict()
    in_memory = set(state["keys"][0][state["trust"] > 0].tolist())
    assert in_memory == (set(range(20)) - {3}) | {40, 5}  # 3 was seen again and is not trusted; 42 has just .7
    assert 0 < repair.pop_logs()["selection_repaired_share"] < 1 and repair.pop_logs() == {}


def test_blocks_change_nothing():
    torch.manual_seed(0)
    rows, columns, targets = unit(9, 4).requires_grad_(), unit(9, 4).requires_grad_(), torch.randn(9, 9).double()
    ends = []
    for max_logits in (1000, 20):
        losses = soft_target_losses(rows, columns, 3.0, lambda part: targets[part].log_softmax(1), max_logits)
        ends.append((losses, *torch.autograd.grad(losses.square().sum(), (rows, columns))))
    torch.testing.assert_close(*ends)


def test_nothing_is_repaired_early_or_without_memory():
    repair = Repair(memory=64, neighbours=1)
    texts, images = unit(6, 4).requires_grad_(), unit(6, 4).requires_grad_()
    opinion = Opinion(torch.tensor([0.9, 0.9, 0.9, 0.9, 0.1, 0.1]), torch.ones(6))
    batch = {"sample_id": torch.arange(6)}
    for progress, is_repaired in ((0.05, False), (0.125, False), (0.5, True)):
        repair.begin_step(progress)
        loss = repair.compute_loss(
            torch.nn.Identity(), batch, {"text_embeds": texts, "image_embeds": images}, torch.tensor(5.0), opinion
        )
        assert bool(loss > 0) is is_repaired and loss.requires_grad
    assert repair.pairs.count == 4


def test_the_target_of_a_wrong_caption_holds_its_true_image():
    """Made topics: the caption of topic t with an image of another topic gets the images of topic t."""
    torch.manual_seed(0)
    topics, looks = unit(8, 16).float(), unit(8, 12).float()
    numbers = torch.arange(400) % 8
    captions = F.normalize(topics[numbers] + 0.1 * torch.randn(400, 16), dim=1)
    images = 5 + looks[numbers] + 0.1 * torch.randn(400, 12)
    repair = Repair(memory=512)
    keys = torch.stack([torch.arange(400), torch.arange(400)])
    repair.pairs.add(captions, images, torch.full((400,), 0.9), keys, torch.ones(400, dtype=torch.bool))
    found = repair.pairs.find_images(topics, torch.arange(1000, 1008).repeat(2, 1), 4)
    nearest = (found @ repair.pairs.center(images).T).topk(20).indices
    assert (numbers[nearest] == torch.arange(8)[:, None]).all()


def test_the_strategy_draws_pairs_for_their_repair_as_well():
    """Each candidate is drawn in proportion to its weight and its need of repair; the loss divides by that."""
    torch.manual_seed(0)
    images = unit(40, 8).float()
    texts = F.normalize(images + 0.4 * torch.randn(40, 8), dim=1)
    texts[20:] = unit(20, 8).float()  # strangers
    scores = CandidateScores(torch.arange(40), images, texts, torch.tensor(8.0), torch.tensor(0.0), "softmax")
    rule = make_strategy("noisy_channel", repairs=True)
    rule.repair_strength = 0.5
    ledger, drawn = SampleLedger(40, columns=rule.columns), torch.zeros(40)
    rule.record(scores.sample_id, scores.correlation, ledger, rule.measure(scores, ledger))
    posterior = torch.sigmoid(math.log(40) - scores.loss)  # pi is 1/2
    need = posterior**2 + 0.5 * min(1, float((posterior**2).sum() / (1 - posterior).sum())) * (1 - posterior)
    inclusion = find_inclusion(need, 16).float()
    for seed in range(400):
        rule.generator.manual_seed(seed)
        selection = rule.select(scores, ledger, 16)
        drawn[selection.indices] += 1 / 400
        batch = {"sample_id": selection.indices, "pair_weight": selection.weights}
        opinion = rule.read_opinion(ledger, batch)
        torch.testing.assert_close(opinion.matched, posterior[selection.indices])
        torch.testing.assert_close(opinion.factors, 1 / inclusion[selection.indices], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(drawn, inclusion, rtol=0, atol=0.1)
    assert drawn[20:].sum() > 2
    assert make_strategy("noisy_channel").read_opinion(ledger, batch) is None


# ---- in a run ----

SMALL = {"selection_options": None, "selection_strategy": "none", "noisy_channel": {}, "record_selection": False}
SMALL |= {"repair": {"neighbours": 1, "memory": 64}, "learning_rate": 3e-3}


def state_of(trainer: DissectTrainer) -> dict[str, torch.Tensor]:
    repair = trainer.objective.repair.state_dict()
    found = {name: torch.as_tensor(value) for name, value in repair["pairs"].items()}
    found |= {f"average {name}": value for name, value in repair["space"].get("copy", {}).items()}
    return found | {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


def trust_at_first(trainer: DissectTrainer) -> None:
    """Begin a run with the belief that 9 of 10 pairs match, so that a few steps fill the memory."""
    for rule in (trainer.objective.robust, trainer.strategy):
        if hasattr(rule, "channel"):
            rule.channel.pi = 0.9


RUNS = {
    "map, accumulation": dict(gradient_accumulation_steps=2, dropout=0.1),
    "stream, two workers": dict(stream=True, dataloader_num_workers=2),
    "gradient caching, both sides": dict(grad_cache_chunk_size=3, repair={"side": "both", "neighbours": 1}),
    "averaged space, mismatched pairs": dict(
        repair={"space": "average", "all_pairs": False, "neighbours": 1}, dropout=0.1
    ),
    "gsc": dict(noisy_channel=None, gsc={"warmup_epochs": 0}),
    "strategy": dict(noisy_channel=None, selection_strategy="noisy_channel", selection_ratio=0.75),
}


@pytest.mark.parametrize("run", RUNS)
def test_a_resumed_run_is_the_uninterrupted_one(run, tmp_path):
    settings = {**SMALL, "save_steps": 5, "max_steps": 12, "logging_steps": 1, **RUNS[run]}
    whole = make_trainer(tmp_path, **settings)
    trust_at_first(whole)
    whole.train()
    shares = [entry.get("selection_repaired_share", 0) for entry in whole.state.log_history if "loss" in entry]
    assert sum(shares[6:]) > 0 and whole.objective.repair.pairs.count >= 4
    resumed = make_trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    torch.testing.assert_close(state_of(resumed), state_of(whole), rtol=0, atol=0)


def small_trainer(folder, model=None, rows=None, **settings) -> DissectTrainer:
    family, processor = tiny_models.tiny_clip()
    defaults = dict(per_device_train_batch_size=16, num_train_epochs=3, learning_rate=1e-3, save_run_folder=False)
    defaults |= {"selection_strategy": "none", "noisy_channel": {}, "save_strategy": "no", "logging_steps": 2}
    defaults |= {"repair": {"neighbours": 1}}
    return DissectTrainer(
        model=family if model is None else model,
        processing_class=processor,
        train_dataset=shuffle_captions(tiny_models.tiny_pairs(64), rate=0.25) if rows is None else rows,
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


@pytest.mark.parametrize("model", ["tiny_siglip", "tiny_dual_encoder", "lora", "mola"])
def test_other_models_train_and_keep_their_mode(model, tmp_path):
    adapters = {"lora": tiny_models.with_lora, "mola": tiny_models.with_mola}
    if model in adapters:
        network, processor = tiny_models.tiny_clip()
        network = adapters[model](network)
    else:
        network, processor = getattr(tiny_models, model)()
    args = DissectTrainingArguments(
        str(tmp_path), **{**SMALL, "repair": {"space": "average", "neighbours": 1}, "max_steps": 8, "use_cpu": True}
    )
    args.save_run_folder, args.disable_tqdm, args.per_device_train_batch_size = False, True, 16
    trainer = DissectTrainer(network, args, processing_class=processor, train_dataset=tiny_models.tiny_pairs(64))
    trust_at_first(trainer)
    trainer.train()
    assert all(weight.isfinite().all() for weight in network.parameters())
    assert trainer.objective.repair.pairs.count > 0


def test_the_space_is_that_of_stored_features_where_there_are_some(tmp_path):
    config = {
        "model_type": "vision-text-dual-encoder",
        "vision_config": {"model_type": "precomputed_features", "hidden_size": 24},
        "text_config": {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        "projection_dim": 8,
    }
    rows = make_feature_pairs(128)
    model, processor = build_model_and_processor(config, captions=rows["caption"])
    args = DissectTrainingArguments(
        str(tmp_path), **SMALL, image_column="image_features", max_steps=12, use_cpu=True, report_to="none"
    )
    args.save_run_folder, args.disable_tqdm, args.per_device_train_batch_size = False, True, 32
    trainer = DissectTrainer(model, args, processing_class=processor, train_dataset=rows)
    assert isinstance(trainer.objective.repair.space, StoredSpace)
    trainer.train()
    assert trainer.objective.repair.pairs.images.shape[1] == 24
    for given, problem in (
        ({"encoder": "some/encoder"}, "repair.encoder .*some/encoder.*stored features"),
        ({"space": "stored"}, None),
        ({"space": "learnt"}, None),
    ):
        if problem is None:
            made = args.make_objective("softmax", 1, model)
            assert type(made.repair.space) is StoredSpace
            continue
        args.repair = {**args.repair, **given}
        with pytest.raises(ValueError, match=problem):
            args.make_objective("softmax", 1, model)
        args.repair = {**args.repair, "encoder": None}


def test_a_frozen_encoder_gives_the_space_and_is_no_part_of_the_run(tmp_path):
    encoder, processor = tiny_models.tiny_clip(seed=3)
    encoder.save_pretrained(tmp_path / "encoder")
    processor.save_pretrained(tmp_path / "encoder")
    trainer = small_trainer(tmp_path, repair={"encoder": str(tmp_path / "encoder"), "neighbours": 1})
    trainer.train()
    size = trainer.objective.repair.pairs.images.shape[1]
    assert size == encoder.config.vision_config.hidden_size and trainer.objective.repair.pairs.count > 0
    pixels = torch.randn(3, 3, *[encoder.config.vision_config.image_size] * 2)
    vectors = trainer.objective.repair.space.embed(trainer.model, {"pixel_values": pixels}, {}, True)
    torch.testing.assert_close(vectors, encoder.eval().vision_model(pixels).pooler_output)
    assert not vectors.requires_grad
    processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    processor.save_pretrained(tmp_path / "other")
    encoder.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="repair.encoder .*its image processor"):
        small_trainer(tmp_path, repair={"encoder": str(tmp_path / "other")})
    with pytest.raises((OSError, ValueError), match="repair.encoder"):
        small_trainer(tmp_path, repair={"encoder": str(tmp_path / "nowhere")})


def test_the_share_is_logged_and_the_settings_stand_in_the_card(tmp_path):
    trainer = small_trainer(tmp_path, save_run_folder=True, learning_rate=3e-3)
    trainer.train()
    logged = [entry.get("selection_repaired_share") for entry in trainer.state.log_history if "loss" in entry]
    assert logged[0] is None and 0 <= logged[-1] < 1
    settings = json.loads((tmp_path / "metrics.json").read_text())["settings"]
    assert settings["repair"]["neighbours"] == 1
    card = (tmp_path / "README.md").read_text()
    assert "| Repair of mismatched pairs |" in card and "liu2026in2r" in card


REFUSED = [
    (dict(noisy_channel=None), "repair=.*which an objective has to tell it"),
    (dict(noisy_channel=None, rince={}), "repair=.*which an objective has to tell it"),
    (dict(noisy_channel=None, gsc={"dual": True}), "repair=.*dual"),
    (dict(selection_strategy="small_loss"), "repair=.*does not go with the strategy small_loss.*none or random"),
    (dict(noisy_channel=None, selection_strategy="noisy_channel", selection_rescore_every=8), "rescore_every=8"),
    (dict(noisy_channel=None, gsc={}, selection_strategy="noisy_channel"), "repair=.*with gsc next to the strategy"),
    (dict(repair={"encoder": "a/b", "space": "average"}), "repair=.*set space to auto"),
    (dict(repair={"side": "image"}), "repair: side='image'.*caption, both"),
    (dict(repair={"memory": 8}), "repair: memory=8"),
    (dict(repair={"neighbours": 0}), "repair: neighbours=0"),
    (dict(repair={"strength": math.nan}), "repair: strength=nan"),
    (dict(repair={"size": 8}), "repair=.*'size' is not a setting of it"),
]


@pytest.mark.parametrize(("settings", "problem"), REFUSED)
def test_what_cannot_be_repaired_is_refused_by_name(settings, problem, tmp_path):
    given = {"selection_strategy": "none", "noisy_channel": {}, "repair": {}, "num_train_epochs": 3, **settings}
    with pytest.raises(ValueError, match=problem):
        DissectTrainingArguments(str(tmp_path), use_cpu=True, **given)


def test_a_recipe_is_checked_likewise():
    given = ["objective.repair={}", "selection.strategy=none"]
    with pytest.raises(ValueError, match="objective.repair: does not know which pairs are mismatched"):
        Recipe.load("flickr8k-features", given)
    with pytest.raises(ValueError, match="objective.repair: does not go with the strategy dissect"):
        Recipe.load("flickr8k-features", [given[0], "objective.noisy_channel={}", "selection.strategy=dissect"])
    recipe = Recipe.load("flickr8k-features", [*given, "objective.noisy_channel={}", "objective.repair.side=both"])
    assert recipe.objective.repair.side == "both"


# ---- several processes ----


def train_on_rank(steps: int = 6):
    """Train on the own part of ten pairs; return gradients of the last step and the memory."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    found = {}
    for side, space in (("caption", ImageSpace()), ("both", AverageSpace())):
        model, batch = model_and_batch("tiny_clip")
        batch["sample_id"] = torch.arange(10) * 3
        size = 10 // world
        batch = {name: value[rank * size : (rank + 1) * size] for name, value in batch.items()}
        model = DistributedDataParallel(model.train()) if world > 1 else model.train()
        repair = Repair(side=side, memory=64, neighbours=1, space=space)
        objective = Objective("softmax", robust=NoisyChannelObjective(), repair=repair)
        ledger, ranks = SampleLedger(40, columns=("evidence",)), Ranks(Accelerator(cpu=True))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for step in range(steps):
            objective.begin_step((step + 1) / steps)
            objective.robust.channel.pi = 0.7
            optimizer.zero_grad()
            outputs = model(**forward_inputs(model, batch))
            scale, bias = logit_scale_and_bias(model)
            objective.compute_loss(model, batch, outputs, scale, bias, ledger).backward()
            evidence = objective.compute_evidence(outputs, batch["sample_id"], ledger)
            columns = ranks.gather_columns({"sample_id": batch["sample_id"], **evidence}, [size] * world)
            objective.robust.record(columns["sample_id"], columns, ledger)
            objective.robust.observe(ranks.add_up(objective.robust.summarize(evidence)))
            optimizer.step()
        assert repair.pop_logs()["selection_repaired_share"] > 0
        found[side] = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
        found[side] |= {name: torch.as_tensor(value) for name, value in repair.pairs.state_dict().items()}
        counts = ranks.gather(torch.tensor([repair.pairs.count]))
        assert (counts == counts[0]).all()
    return found


def test_two_processes_train_like_one_on_the_union(tmp_path):
    together = on_ranks([2], tmp_path, train_on_rank)[2]
    torch.testing.assert_close(together, train_on_rank(), rtol=1e-5, atol=1e-7)
