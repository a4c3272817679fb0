"""What fails for all pairs fails before training, with the cause, and so does a collator that lacks the ids."""

import random

import numpy as np
import pytest
import torch
from datasets import Dataset
from testing import tiny_models

from hf_dissect import DissectTrainer, DissectTrainingArguments, SelectionCollator
from hf_dissect.data.bad_rows import TooManyBadRows
from hf_dissect.data.first_pairs import check_first_pairs

SETTINGS = dict(
    per_device_train_batch_size=8,
    max_steps=4,
    report_to="none",
    disable_tqdm=True,
    save_strategy="no",
    save_run_folder=False,
    max_bad_fraction=1.0,
)
GOOD = tiny_models.tiny_pairs(32)


def make_trainer(folder, train, eval_dataset=None, collator=None, **settings) -> DissectTrainer:
    model, processor = tiny_models.tiny_clip()
    return DissectTrainer(
        model=model,
        processing_class=processor,
        data_collator=collator,
        train_dataset=train,
        eval_dataset=eval_dataset,
        args=DissectTrainingArguments(str(folder), **{**SETTINGS, **settings}),
    )


def missing(num_rows: int = 32, first: int | None = None) -> Dataset:
    """Paths of missing files, from the first row, and good pictures after them."""
    rows = tiny_models.tiny_pairs(num_rows)[:]
    for row in range(num_rows if first is None else first):
        rows["image"][row] = {"bytes": None, "path": f"/data/{row}.jpg"}
    return Dataset.from_dict(rows, features=GOOD.features)


class Rows(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


KINDS = {
    "table": lambda data: data,
    "list": lambda data: data.to_list(),
    "data frame": lambda data: data.to_pandas(),
    "transform": lambda data: data.with_transform(lambda batch: batch),
    "torch": lambda data: Rows([{**row, "sample_id": number} for number, row in enumerate(data)]),
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_run_whose_first_pictures_all_fail_stops_before_training_with_path_and_cause(kind, tmp_path):
    for data in (missing(), missing(first=16)):
        with pytest.raises(TooManyBadRows) as caught:
            make_trainer(tmp_path, KINDS[kind](data))
        message = str(caught.value)
        assert message.startswith("train_dataset: none of the first 16 pictures can be read. First problems: no such")
        assert "no such file: /data/0.jpg (id 0); no such file: /data/1.jpg (id 1)" in message
        assert "image_column" in message


def test_one_good_picture_among_the_first_is_enough(tmp_path):
    trainer = make_trainer(tmp_path, missing(first=15))
    trainer.train()
    assert len(trainer.bad_rows) == 15 and trainer.state.global_step == 4


@pytest.mark.parametrize("kind", [*KINDS, "stream", "one of several"])
def test_evaluation_data_whose_first_pictures_all_fail_stop_the_run_before_training(kind, tmp_path):
    kinds = {**KINDS, "stream": lambda data: data.to_iterable_dataset(), "one of several": lambda data: {"b": data}}
    bad = kinds[kind](missing())
    with pytest.raises(TooManyBadRows, match=r"eval_dataset(\['b'\])?: none of the first 16 .*/data/0.jpg"):
        make_trainer(tmp_path, GOOD, eval_dataset=bad)
    with pytest.raises(TooManyBadRows, match="eval_dataset.*none of the first 16 .*/data/0.jpg"):
        make_trainer(tmp_path, GOOD).evaluate(bad)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_stops_at_its_first_batch(workers, tmp_path):
    stream = missing().to_iterable_dataset(num_shards=2)
    trainer = make_trainer(tmp_path, stream, dataloader_num_workers=workers)
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    with pytest.raises(
        TooManyBadRows, match=r"None of the first 8 pictures of the stream .*no such file: /data/\d+.jpg"
    ):
        trainer.train()
    assert all(map(torch.equal, before, trainer.model.parameters())) and trainer.state.global_step == 0


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["table", "stream"])
def test_causes_come_from_workers_to_figures_and_messages(workers, kind, tmp_path):
    rows = GOOD[:]
    rows["image"][5] = {"bytes": None, "path": "/data/5.jpg"}
    rows["image"][20] = {"bytes": b"<html>", "path": "page.jpg"}
    data = Dataset.from_dict(rows, features=GOOD.features)
    data = data.to_iterable_dataset(num_shards=2) if kind == "stream" else data
    trainer = make_trainer(tmp_path, data, dataloader_num_workers=workers)
    trainer.train()
    summary = trainer.bad_rows.summary()
    found = {problem["path"]: problem["problem"] for problem in summary["problems"]}
    assert summary["count"] == 2 and found == {
        "/data/5.jpg": "no such file",
        "page.jpg": "UnidentifiedImageError: not a picture, the file holds b'<html>'",
    }
    with pytest.raises(TooManyBadRows, match=r"First problems: no such file: /data/\d.jpg \(id"):
        make_trainer(tmp_path, missing(first=7), max_bad_fraction=0.1).train()


def test_keys_name_rows_without_a_path(tmp_path):
    data = GOOD.add_column("key", [f"shard/{row:05}" for row in range(32)])
    rows = data[:]
    rows["image"][3] = {"bytes": b"broken", "path": None}
    trainer = make_trainer(tmp_path, Dataset.from_dict(rows, features=data.features), id_column="key")
    trainer.train()
    assert trainer.bad_rows.summary()["problems"][0]["path"] == "shard/00003"


# ---- collators of one's own ----


def plain(rows):
    """A collator as one writes it for CLIP."""
    tokenizer, images = tiny_models.clip_tokenizer(), torch.zeros(len(rows), 3, 32, 32)
    return {"pixel_values": images, **tokenizer([row["caption"] for row in rows], padding=True, return_tensors="pt")}


UNFIT = {
    "no ids": (plain, "data_collator returns no sample_id, only pixel_values, input_ids.*calls hf_dissect.Selection"),
    "ids in a list": (lambda rows: {**plain(rows), "sample_id": [0] * len(rows)}, "returns a sample_id of a list"),
    "floats": (
        lambda rows: {**plain(rows), "sample_id": torch.zeros(len(rows))},
        "a sample_id of a tensor of float32",
    ),
    "texts": (
        lambda rows: {**plain(rows), "sample_id": torch.arange(len(rows)), "text": ["a"] * len(rows)},
        "returns a list as 'text' for 16 pairs",
    ),
    "one number": (
        lambda rows: {**plain(rows), "sample_id": torch.arange(len(rows)), "scale": torch.tensor(1.0)},
        r"returns a tensor of float32 of shape \(\) as 'scale'",
    ),
    "a tuple": (lambda rows: (torch.zeros(3), torch.zeros(3)), "data_collator returns tuple, not a dict of tensors"),
}


@pytest.mark.parametrize("case", list(UNFIT))
def test_a_collator_that_lacks_the_ids_is_refused_before_training(case, tmp_path):
    collator, message = UNFIT[case]
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, GOOD, collator=collator)


def test_a_collator_of_a_stream_is_refused_at_the_first_batch(tmp_path):
    trainer = make_trainer(tmp_path, GOOD.to_iterable_dataset(), collator=plain)
    with pytest.raises(ValueError, match="data_collator returns no sample_id"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_collator_that_adds_to_ours_or_returns_ids_trains(tmp_path):
    ours = SelectionCollator(tiny_models.tiny_clip()[1])

    def brighter(rows):
        batch = ours(rows)
        return {**batch, "pixel_values": batch["pixel_values"] + 0.1}

    def own(rows):
        return {**plain(rows), "sample_id": torch.tensor([row["sample_id"] for row in rows])}

    for collator in (brighter, own):
        trainer = make_trainer(tmp_path, GOOD, eval_dataset=GOOD, collator=collator)
        trainer.train()
        assert trainer.state.global_step == 4 and trainer.ledger.column("correlation").isfinite().any()


def test_masks_need_the_keys_of_images_and_captions(tmp_path):
    def own(rows):
        return {**plain(rows), "sample_id": torch.tensor([row["sample_id"] for row in rows])}

    trainer = make_trainer(tmp_path, GOOD, collator=own, mask_false_negatives=True)
    with pytest.raises(ValueError, match="mask_false_negatives needs image_key and caption_key .* data_collator"):
        trainer.train()


def test_random_numbers_are_as_before():
    def noisy(rows):
        random.random(), np.random.rand(), torch.rand(1)
        return {"sample_id": torch.arange(len(rows))}

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    check_first_pairs(noisy, train_dataset=Rows([{"sample_id": 0}] * 3))
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected
