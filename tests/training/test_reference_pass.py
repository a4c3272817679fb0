"""Runs whose strategy compares with a reference model: the pass before training, its resume, streams and refusals."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from testing import tiny_models
from testing.feature_pairs import make_feature_pairs
from testing.launched import on_ranks
from testing.reference_ranks import train_with_reference
from transformers import BertConfig, VisionTextDualEncoderConfig, VisionTextDualEncoderModel

from hf_dissect import DissectTrainer, DissectTrainingArguments, OnlineSelector, SelectionCollator
from hf_dissect.data import as_pairs, shuffle_captions
from hf_dissect.losses.pair_evidence import recover_losses
from hf_dissect.models.feature_encoder import PrecomputedFeaturesConfig
from hf_dissect.training.interruption import StoppedBySignal
from hf_dissect.training.reference_pass import ReferencePass

COMMON = dict(per_device_train_batch_size=16, learning_rate=1e-3, logging_steps=2, report_to="none", disable_tqdm=True)


def make_trainer(folder, train=None, family="tiny_clip", reference=None, **settings) -> DissectTrainer:
    model, processor = getattr(tiny_models, family)()
    if reference is None and "selection_reference" not in settings:
        reference = getattr(tiny_models, family)(seed=5)[0]
    arguments = {**COMMON, "check_reload": False, "save_run_folder": False, **settings}
    return DissectTrainer(
        model,
        DissectTrainingArguments(str(folder), **arguments),
        processing_class=processor,
        train_dataset=shuffle_captions(tiny_models.tiny_pairs(64), rate=0.25) if train is None else train,
        reference_model=reference,
    )


def feature_model(size: int, seed: int = 0) -> VisionTextDualEncoderModel:
    torch.manual_seed(seed)
    text = BertConfig(**{**tiny_models.TRANSFORMER, "vocab_size": len(tiny_models.bert_tokenizer())})
    vision = PrecomputedFeaturesConfig(hidden_size=size)
    config = VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=16)
    return VisionTextDualEncoderModel(config).eval()


def weights(model) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def embeds_of(model, trainer, numbers):
    batch = trainer.data_collator([trainer.train_dataset[number] for number in numbers])
    with torch.no_grad():
        outputs = model(**{name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")})
    return outputs.image_embeds, outputs.text_embeds


def spy_on_passes(trainer) -> list[int]:
    """Ids of the pairs that the reference encodes."""
    encoded, score = [], trainer.selector.reference.score

    def watch(batch, sample_id, **settings):
        if trainer.selector.reference.store is None:
            encoded.extend(sample_id.tolist())
        return score(batch, sample_id, **settings)

    trainer.selector.reference.score = watch
    return encoded


@pytest.mark.parametrize(
    ("strategy", "column"),
    [("learnability", "reference_evidence"), ("rho", "reference_loss"), ("coreset", "coreset_score")],
)
def test_the_pass_scores_every_pair_once_before_the_first_step(strategy, column, tmp_path):
    """One batch holds all pairs, so the losses are those among all of them."""
    reference = tiny_models.tiny_clip(seed=5)[0]
    options = {"score": "clip_loss"} if strategy == "coreset" else {}
    trainer = make_trainer(
        tmp_path,
        reference=reference,
        selection_strategy=strategy,
        selection_options=options,
        per_device_train_batch_size=64,
        max_steps=3,
    )
    before, encoded = weights(reference), spy_on_passes(trainer)
    trainer.train()
    assert sorted(encoded) == list(range(64))
    image, text = embeds_of(reference, trainer, range(64))
    logits = text @ image.T * reference.logit_scale.exp()
    losses = ((logits.logsumexp(1) + logits.logsumexp(0)) / 2 - logits.diagonal()).detach()
    found = trainer.ledger.column(column)
    as_loss = {"learnability": lambda evidence: recover_losses(evidence, 64), "coreset": torch.neg, "rho": torch.clone}
    found = as_loss[strategy](found)
    torch.testing.assert_close(found, losses, rtol=1e-4, atol=1e-4)
    # Frozen, in evaluation mode, and not trained.
    assert weights(reference).equal(before) and not any(part.requires_grad for part in reference.parameters())
    trained = {id(part) for group in trainer.optimizer.param_groups for part in group["params"]}
    assert not trained & {id(part) for part in reference.parameters()}


def test_batches_of_the_pass_are_shuffled_and_about_as_large_as_those_of_training(tmp_path):
    trainer = make_trainer(tmp_path, train=tiny_models.tiny_pairs(50), selection_strategy="rho", max_steps=1)
    sizes, score = [], trainer.selector.reference.score

    def watch(batch, sample_id, **settings):
        sizes.append(len(sample_id))
        assert sample_id.tolist() != sorted(sample_id.tolist())
        return score(batch, sample_id, **settings)

    trainer.selector.reference.score = watch
    trainer.train()
    assert sorted(sizes) == [12, 12, 13, 13]  # no small last batch, whose losses would be among few


def test_an_unreadable_pair_has_no_score_and_the_run_goes_to_its_end(tmp_path):
    rows = tiny_models.tiny_pairs(64)
    captions = ["" if number == 7 else caption for number, caption in enumerate(rows["caption"])]
    rows = rows.remove_columns("caption").add_column("caption", captions)
    for strategy, column in (("learnability", "reference_evidence"), ("coreset", "coreset_score")):
        settings = {"selection_strategy": strategy, "max_steps": 5, "max_bad_fraction": 0.1}
        trainer = make_trainer(tmp_path, train=rows, **settings)
        trainer.train()
        assert trainer.ledger.column(column).isnan().nonzero().tolist() == [[7]]


@pytest.mark.parametrize("strategy", ["learnability", "rho", "jest", "coreset"])
def test_a_resumed_run_is_the_same_bit_for_bit_and_repeats_no_pass_of_the_ledger(strategy, tmp_path):
    settings = {"selection_strategy": strategy, "num_train_epochs": 3, "save_strategy": "steps", "save_steps": 5}
    whole = make_trainer(tmp_path, **settings)
    whole.train()
    resumed = make_trainer(tmp_path, **settings)
    encoded = spy_on_passes(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    # The embeddings of jest are in no checkpoint.
    assert sorted(encoded) == (list(range(64)) if strategy == "jest" else [])
    assert weights(whole.model).equal(weights(resumed.model))
    for name in whole.ledger.columns:
        torch.testing.assert_close(
            whole.ledger.column(name), resumed.ledger.column(name), rtol=0, atol=0, equal_nan=True
        )
    with safe_open(tmp_path / "checkpoint-5" / "model.safetensors", "pt") as file:
        assert len(file.keys()) == len(whole.model.state_dict())  # of one model


def test_a_checkpoint_of_another_reference_gets_new_scores(tmp_path):
    settings = {"selection_strategy": "rho", "max_steps": 8, "save_steps": 4}
    make_trainer(tmp_path, **settings).train()
    state = json.loads((tmp_path / "checkpoint-4" / "dissect_state.json").read_text())
    assert state["parts"]["selection"]["reference"] == "CLIPModel"
    other = tiny_models.tiny_clip(seed=6)[0]
    other.name_or_path = "somebody/other"
    resumed = make_trainer(tmp_path, reference=other, **settings)
    encoded = spy_on_passes(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert sorted(encoded) == list(range(64))


def test_a_pass_that_is_interrupted_leaves_nothing(tmp_path):
    trainer = make_trainer(tmp_path, selection_strategy="rho", max_steps=4)
    score, calls = trainer.selector.reference.score, []

    def stop_at_second(batch, sample_id, **settings):
        calls.append(len(sample_id))
        if len(calls) == 2:
            trainer.stop_request.made = True
        return score(batch, sample_id, **settings)

    trainer.selector.reference.score = stop_at_second
    with pytest.raises(StoppedBySignal, match="its beginning"):
        trainer.train()
    assert len(calls) == 2 and trainer.ledger.column("reference_loss").isnan().all()
    assert not list(tmp_path.glob("checkpoint-*")) and not trainer.selector.knows_reference


def test_jest_keeps_the_embeddings_if_they_fit(tmp_path, monkeypatch):
    trained = []
    for limit in (2**30, 64 * 32 * 4 - 1):  # one byte too few
        monkeypatch.setattr("hf_dissect.selection.reference.model.LARGEST_STORE", limit)
        trainer = make_trainer(tmp_path, selection_strategy="jest", num_train_epochs=2)
        encoded = spy_on_passes(trainer)
        trainer.train()
        assert len(encoded) == 64 if limit == 2**30 else len(encoded) == 2 * 64 + 16
        trained.append(weights(trainer.model))
    assert (trained[0] - trained[1]).abs().max() < 0.05  # half precision may choose another pair


def test_a_coreset_alone_is_read(tmp_path):
    pairs = as_pairs(tiny_models.tiny_pairs(64))
    trainer = make_trainer(
        tmp_path, train=pairs, selection_strategy="coreset", selection_ratio=0.25, num_train_epochs=3
    )
    collate, read = trainer.data_collator, []

    def watch(rows):
        read.append([row["sample_id"] for row in rows])
        return collate(rows)

    trainer.data_collator = watch
    trainer.train()
    trainer.data_collator = collate
    first = read[:4]  # the pass
    assert sorted(sum(first, [])) == list(range(64))
    image, text = embeds_of(trainer.selector.reference.model, trainer, range(64))
    best = (image * text).sum(1).argsort(descending=True)[:16].sort().values.tolist()
    epochs = [sum(read[4 + 4 * epoch : 8 + 4 * epoch], []) for epoch in range(3)]
    assert all(sorted(epoch) == best for epoch in epochs) and epochs[0] != epochs[1]
    # A step stands for 16 candidates: as many steps as with another rule, of 4 pairs each.
    assert trainer.state.global_step == 12 and {len(batch) for batch in read[4:]} == {4}


@pytest.mark.parametrize("strategy", ["learnability", "rho", "jest"])
def test_a_stream_is_scored_batch_by_batch(strategy, tmp_path):
    stream = tiny_models.tiny_pairs(64).to_iterable_dataset()
    settings = {"selection_strategy": strategy, "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    trainer = make_trainer(tmp_path, train=stream, **settings)
    encoded = spy_on_passes(trainer)
    trainer.train()
    assert len(encoded) == 6 * 16
    resumed = make_trainer(tmp_path, train=stream, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert weights(trainer.model).equal(weights(resumed.model))
    if strategy == "rho":
        assert trainer.ledger.column("reference_loss").isfinite().all()


@pytest.mark.parametrize("family", ["tiny_siglip", "tiny_dual_encoder"])
@pytest.mark.parametrize("strategy", ["learnability", "jest"])
def test_other_families_compare_with_their_kind(family, strategy, tmp_path):
    trainer = make_trainer(tmp_path, family=family, selection_strategy=strategy, max_steps=5, bf16=True, use_cpu=True)
    trainer.train()
    assert weights(trainer.model).isfinite().all()
    assert trainer.selector.reference.store is not None or trainer.ledger.column("reference_evidence").isfinite().all()


@pytest.mark.parametrize("history", ["average", "snapshot"])
def test_a_history_by_an_earlier_model_serves_a_stream_seen_once_and_resumes(history, tmp_path):
    options = {"history": history, "model_warmup_steps": 3}
    options |= {"average_momentum": 0.9} if history == "average" else {"snapshot_every": 3}
    settings = {"selection_options": options, "selection_ratio": 0.5, "save_strategy": "steps", "save_steps": 5}
    stream = tiny_models.tiny_pairs(128).to_iterable_dataset()

    def trainer_of_once():
        model, processor = tiny_models.tiny_clip()
        arguments = {**COMMON, "check_reload": False, "save_run_folder": False, "max_steps": 8, **settings}
        args = DissectTrainingArguments(str(tmp_path), record_selection=True, **arguments)
        return DissectTrainer(model, args, processing_class=processor, train_dataset=stream)

    whole = trainer_of_once()
    whole.train()
    known = whole.ledger.column("history").isfinite().sum()
    assert known == (5 * 16 if history == "average" else 3 * 16)  # not while it warms up, or has just been taken
    resumed = trainer_of_once()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert weights(whole.model).equal(weights(resumed.model))
    state = [trainer.strategy.past_model.state_dict() for trainer in (whole, resumed)]
    torch.testing.assert_close(*state, rtol=0, atol=0)


@pytest.mark.slow
def test_two_ranks_that_choose_together_choose_as_one(tmp_path):
    results = on_ranks([1, 2], tmp_path, train_with_reference)
    for strategy in ("learnability", "rho", "jest"):
        (one, kept_one), (two, kept_two) = (results[size][strategy] for size in (1, 2))
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4, equal_nan=True)
        assert kept_one == kept_two, strategy
    # Each rank reads its part of the coreset, which is the same.
    assert results[1]["coreset"][1] == results[2]["coreset"][1]


# ---- refusals ----


def saved(folder: Path, family: str, seed: int = 3, **changes) -> str:
    model, processor = getattr(tiny_models, family)(seed)
    for name, value in changes.items():
        setattr(processor, name, value)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def test_a_folder_serves_as_reference_and_its_name_is_in_metrics_and_card(tmp_path):
    folder = saved(tmp_path / "reference", "tiny_clip")
    trainer = make_trainer(
        tmp_path / "run",
        selection_strategy="learnability",
        selection_reference=folder,
        max_steps=4,
        save_run_folder=True,
        save_strategy="steps",
        save_steps=2,
    )
    trainer.train()
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["reference"] == "a local model" and folder not in (tmp_path / "run" / "metrics.json").read_text()
    card = (tmp_path / "run" / "README.md").read_text()
    assert "Reference model" in card and "evans2024jest" in card and folder not in card
    # The model of this run is a reference, too, as is one of its checkpoints.
    for source in (tmp_path / "run", tmp_path / "run" / "checkpoint-2"):
        make_trainer(tmp_path / "next", selection_strategy="rho", selection_reference=source, max_steps=1).train()


def test_an_adapter_and_features_serve_as_reference(tmp_path):
    model, processor = tiny_models.tiny_clip(seed=3)
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    model.name_or_path = str(tmp_path / "base")
    tiny_models.with_lora(model).save_pretrained(tmp_path / "adapter")
    trainer = make_trainer(
        tmp_path / "run", selection_strategy="jest", selection_reference=str(tmp_path / "adapter"), max_steps=2
    )
    trainer.train()
    assert not any(part.requires_grad for part in trainer.selector.reference.model.parameters())


@pytest.mark.parametrize(
    ("strategy", "settings", "message"),
    [
        ("jest", {}, r"selection_reference .* is missing: the strategy 'jest' needs"),
        (
            "random",
            {"reference": "tiny_clip"},
            r"selection_reference .* is a CLIPModel, and .*'random' compares with no",
        ),
        ("rho", {"reference": "tiny_siglip"}, "has the sigmoid loss and the model that trains the softmax loss"),
        ("coreset", {"source": "tiny_siglip"}, "selection_reference .*(tokenizer|padded)"),
        (
            "learnability",
            {"source": "tiny_dual_encoder"},
            "has another tokenizer than the model .* Set model.tokenizer",
        ),
        ("rho", {"source": "nowhere"}, "selection_reference .*nowhere"),
        ("rho", {"source": "tiny_clip", "reference": "tiny_clip"}, "reference_model is given, too; pass one"),
        ("rho", {"source": "large"}, r"image processor makes \(3, 48, 48\) of a picture, not \(3, 32, 32\)"),
        ("rho", {"source": "bright"}, "image processor differs"),
        ("rho", {"source": "short"}, "reads captions of at most 8 tokens, and the model that trains 16"),
        (
            "rho",
            {"reference": "features"},
            "reads stored features of 6 numbers where the model that trains reads images",
        ),
        ("rho", {"reference": "itself"}, "shares weights with the model that trains"),
        ("rho", {"reference": "linear"}, "has no get_image_features"),
    ],
)
def test_a_reference_that_does_not_fit_is_refused_before_training(strategy, settings, message, tmp_path):
    model, processor = tiny_models.tiny_clip()
    source, reference = settings.get("source"), settings.get("reference")
    if source == "large":
        large = tiny_models.square_image_processor()
        large.size = {"height": 48, "width": 48}
        source = saved(tmp_path / "large", "tiny_clip", image_processor=large)
    elif source == "bright":
        bright = tiny_models.square_image_processor()
        bright.image_mean = [0.1, 0.1, 0.1]
        source = saved(tmp_path / "bright", "tiny_clip", image_processor=bright)
    elif source == "short":
        short = tiny_models.clip_tokenizer()
        short.model_max_length = 8
        source = saved(tmp_path / "short", "tiny_clip", tokenizer=short)
    elif source == "nowhere":
        source = str(tmp_path / "nowhere")
    elif source is not None:
        source = saved(tmp_path / "saved", source)
    if reference is not None:
        made = {"itself": lambda: model, "linear": lambda: torch.nn.Linear(2, 2), "features": lambda: feature_model(6)}
        reference = made.get(reference, lambda: getattr(tiny_models, settings["reference"])(seed=2)[0])()
    args = DissectTrainingArguments(
        str(tmp_path / "run"), selection_strategy=strategy, selection_reference=source, **COMMON
    )
    with pytest.raises((ValueError, OSError), match=message):
        DissectTrainer(
            model,
            args,
            processing_class=processor,
            train_dataset=tiny_models.tiny_pairs(32),
            reference_model=reference,
        )


def test_features_are_compared_with_features_of_the_same_size(tmp_path):
    def trainer_with(reference):
        arguments = {**COMMON, "check_reload": False, "save_run_folder": False, "max_steps": 2}
        args = DissectTrainingArguments(
            str(tmp_path), selection_strategy="rho", image_column="image_features", **arguments
        )
        return DissectTrainer(
            feature_model(24),
            args,
            processing_class=tiny_models.bert_tokenizer(),
            train_dataset=make_feature_pairs(32),
            reference_model=reference,
        )

    trainer = trainer_with(feature_model(24, seed=1))
    trainer.train()
    assert trainer.ledger.column("reference_loss").isfinite().all()
    with pytest.raises(ValueError, match="reads images where the model that trains reads stored features of 24"):
        trainer_with(tiny_models.tiny_dual_encoder()[0])
    with pytest.raises(ValueError, match="reads stored features of 23 numbers where"):
        trainer_with(feature_model(23))


def test_a_coreset_of_a_stream_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'coreset' scores all pairs before the first step, which a stream"):
        make_trainer(
            tmp_path, train=tiny_models.tiny_pairs(32).to_iterable_dataset(), selection_strategy="coreset", max_steps=2
        )


def test_a_plain_loop_passes_the_reference_to_the_selector():
    with pytest.raises(ValueError, match="reference is missing: the strategy 'jest'"):
        OnlineSelector("jest")
    model, processor = tiny_models.tiny_clip()
    selector = OnlineSelector("rho", 0.5, reference=tiny_models.tiny_clip(seed=1)[0])
    pairs = as_pairs(tiny_models.tiny_pairs(16))
    batch = SelectionCollator(processor)([pairs[number] for number in range(16)])
    selector.begin_epoch(0)
    assert len(selector.select(model, batch)["sample_id"]) == 8
    assert selector.ledger.column("reference_loss").isfinite().all()


def test_a_run_without_a_reference_makes_no_pass(tmp_path):
    model, processor = tiny_models.tiny_clip()
    trainer = DissectTrainer(
        model,
        DissectTrainingArguments(
            str(tmp_path), selection_strategy="random", max_steps=1, save_run_folder=False, **COMMON
        ),
        processing_class=processor,
        train_dataset=tiny_models.tiny_pairs(32),
    )
    assert any(isinstance(part, ReferencePass) for part in trainer.callback_handler.callbacks)
    trainer.train()
    assert trainer.times["scoring"] < 0.05
