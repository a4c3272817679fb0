"""Data and arguments that do not fit each other are told before training."""

import logging

import pytest
from datasets import Dataset
from testing import tiny_models

from hf_dissect import DissectTrainingArguments, PairDataset
from hf_dissect.data.streaming.pair_stream import PairStream
from hf_dissect.training_data import (
    count_pairs,
    make_collator,
    warn_if_warm_up_outlasts,
    wrap_pairs,
    wrap_training_pairs,
)


def arguments(tmp_path, **settings) -> DissectTrainingArguments:
    return DissectTrainingArguments(str(tmp_path), per_device_train_batch_size=16, use_cpu=True, **settings)


def test_tables_become_pairs(tmp_path):
    args = arguments(tmp_path)
    several = wrap_pairs("train_dataset", tiny_models.tiny_pairs(6, captions_per_image=3), args)
    assert isinstance(several, PairDataset) and count_pairs(several) == 18
    assert wrap_pairs("train_dataset", several, args) is several
    assert wrap_pairs("eval_dataset", None, args) is None
    stream = wrap_pairs("train_dataset", tiny_models.tiny_pairs(6).to_iterable_dataset(), args)
    assert isinstance(stream, PairStream) and count_pairs(stream) is None


def test_each_of_several_evaluation_sets_becomes_pairs(tmp_path):
    sets = {"a": tiny_models.tiny_pairs(4), "b": tiny_models.tiny_pairs(5)}
    assert {name: len(part) for name, part in wrap_pairs("eval_dataset", sets, arguments(tmp_path)).items()} == {
        "a": 4,
        "b": 5,
    }


def test_the_argument_is_named_that_does_not_fit(tmp_path):
    with pytest.raises(ValueError, match=r"^eval_dataset: .*\bphoto\b"):
        wrap_pairs("eval_dataset", Dataset.from_dict({"photo": ["a.png"], "caption": ["a"]}), arguments(tmp_path))
    with pytest.raises(ValueError, match=r"^train_dataset: .*alt"):
        wrap_pairs("train_dataset", tiny_models.tiny_pairs(4), arguments(tmp_path, caption_column="alt"))


def test_columns_are_those_of_the_arguments(tmp_path):
    rows = tiny_models.tiny_pairs(4).rename_columns({"image": "photo", "caption": "alt"})
    pairs = wrap_pairs("train_dataset", rows, arguments(tmp_path, image_column="photo", caption_column="alt"))
    assert pairs[3]["caption"] == rows[3]["alt"]


def test_one_batch_of_candidates_is_the_least(tmp_path):
    args = arguments(tmp_path)
    wrap_training_pairs(tiny_models.tiny_pairs(16), args)
    wrap_training_pairs(tiny_models.tiny_pairs(2).to_iterable_dataset(), args)
    with pytest.raises(
        ValueError, match=r"train_dataset has 15 pairs, fewer than one batch of 16 .*lower per_device_train_batch_size"
    ):
        wrap_training_pairs(tiny_models.tiny_pairs(15), args)


@pytest.mark.parametrize(
    ("max_steps", "warmup_epochs", "accumulation", "warned"),
    # 64 pairs are 4 batches of 16 an epoch.
    [(8, 2, 1, True), (9, 2, 1, False), (4, 2, 2, True), (5, 2, 2, False), (-1, 2, 1, False), (1, 0, 1, False)],
)
def test_a_run_that_ends_in_its_warm_up_is_told(max_steps, warmup_epochs, accumulation, warned, tmp_path, caplog):
    args = arguments(
        tmp_path, max_steps=max_steps, gradient_accumulation_steps=accumulation, selection_strategy="random"
    )
    pairs = wrap_pairs("train_dataset", tiny_models.tiny_pairs(64), args)
    with caplog.at_level(logging.WARNING):
        warn_if_warm_up_outlasts(pairs, {"do this": warmup_epochs, "do that": 0}, args)
    assert (f"before the warm-up of {warmup_epochs} epochs does: all steps do this." in caplog.text) == warned
    assert len(caplog.records) == warned


@pytest.mark.parametrize("family", ["tiny_clip", "tiny_siglip2"])
def test_fast_decoding_reaches_the_collator_or_is_refused(family, tmp_path):
    model, processor = getattr(tiny_models, family)()
    args = DissectTrainingArguments(str(tmp_path), fast_decoding=True, use_cpu=True)
    if family == "tiny_clip":
        assert make_collator(model, processor, args).fast_decoding
    else:
        with pytest.raises(ValueError, match="fast_decoding .*needs an image processor that resizes"):
            make_collator(model, processor, args)
