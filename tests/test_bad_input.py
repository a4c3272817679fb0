"""Every bad input ends in a clear error before training, or in a counted skip, and leaves what was saved before."""

import io
import json

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, Image
from PIL import Image as PILImage
from testing import tiny_models
from transformers import AutoModel, BertConfig, BertModel, TrainingArguments

from hf_dissect import DissectTrainer, DissectTrainingArguments, Recipe, SampleLedger
from hf_dissect.data import as_pairs
from hf_dissect.data.bad_rows import TooManyBadRows
from hf_dissect.recipe.recipe import RecipeError
from hf_dissect.training.non_finite import NonFiniteLossError

BATCH = 8
SETTINGS = dict(
    per_device_train_batch_size=BATCH,
    num_train_epochs=2,
    report_to="none",
    disable_tqdm=True,
    max_bad_fraction=1.0,
    save_strategy="no",
    save_run_folder=False,
)
STREAM = dict(max_steps=8, num_train_epochs=1)


def make_trainer(folder, train, family="tiny_clip", model=None, eval_dataset=None, **settings) -> DissectTrainer:
    own, processor = getattr(tiny_models, family)()
    return DissectTrainer(
        model=own if model is None else model,
        processing_class=processor,
        train_dataset=train,
        eval_dataset=eval_dataset,
        args=DissectTrainingArguments(str(folder), **{**SETTINGS, **settings}),
    )


def trained(folder, train, **settings) -> DissectTrainer:
    """A trainer after training, whose weights and figures are finite and whose run folder can be loaded."""
    trainer = make_trainer(folder, train, save_run_folder=True, **settings)
    before = weights(trainer)
    trainer.train()
    assert weights(trainer).isfinite().all() and not torch.equal(before, weights(trainer))
    loaded = AutoModel.from_pretrained(folder)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), trainer.model.parameters(), strict=True))
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["bad_rows"] == trainer.bad_rows.summary()
    return trainer


def weights(trainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def seen(trainer) -> set[int]:
    """Ids of the pairs that were scored or trained on."""
    correlation = trainer.ledger.column("correlation")
    return set(trainer.ledger.ids[correlation.isfinite()].tolist())


def encoded(image: PILImage.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def pairs_with(images: dict | None = None, captions: dict | None = None, num_rows: int = 16, **shape) -> Dataset:
    """Good pairs, with the image or caption of some rows replaced."""
    data = tiny_models.tiny_pairs(num_rows, **shape)
    rows = data[:]
    name = "captions" if "captions" in rows else "caption"
    for row, content in (images or {}).items():
        rows["image"][row] = content if isinstance(content, dict) or content is None else as_row(content)
    for row, caption in (captions or {}).items():
        rows[name][row] = caption
    return Dataset.from_dict(rows, features=data.features)


def as_row(content: bytes) -> dict:
    return {"bytes": content, "path": None}


PICTURE = tiny_models.tiny_picture(3)[0]
FRAMES = dict(save_all=True, append_images=[tiny_models.tiny_picture(4)[0]], duration=40, loop=0)
TURNED = PILImage.Exif()
TURNED[0x0112] = 6
ODD_BUT_GOOD = {
    "CMYK": encoded(PICTURE.convert("CMYK"), "JPEG"),
    "palette": encoded(PICTURE.convert("P")),
    "palette with transparency": encoded(PICTURE.convert("P"), transparency=0),
    "1 x 1": encoded(PILImage.new("RGB", (1, 1), "red")),
    "1 x 200": encoded(PILImage.new("RGB", (1, 200), "red")),
    "animated GIF": encoded(PICTURE, "GIF", **FRAMES),
    "animated WebP": encoded(PICTURE, "WEBP", **FRAMES),
    "RGBA": encoded(PICTURE.convert("RGBA")),
    "16-bit": encoded(PILImage.fromarray(np.arange(1024, dtype=np.uint16).reshape(32, 32) * 64)),
    "bilevel": encoded(PICTURE.convert("1")),
    "turned by its tag": encoded(PICTURE, "JPEG", exif=TURNED),
}
BAD_IMAGES = {
    "truncated": encoded(PICTURE)[:-600],
    "truncated JPEG": encoded(PICTURE, "JPEG")[:-100],
    "zero bytes": b"",
    "not an image": b"<html>404</html>",
    "no such file": {"bytes": None, "path": "/nowhere/4711.jpg"},
    "missing": None,
}


# ---- images ----


def test_odd_but_good_images_are_trained_on(tmp_path):
    images = dict(enumerate(ODD_BUT_GOOD.values()))
    trainer = trained(tmp_path, pairs_with(images))
    assert trainer.bad_rows.summary() == {"count": 0, "reasons": {}, "ids": []}
    assert seen(trainer) == set(range(16))


def test_bad_images_are_skipped_and_counted(tmp_path):
    images = dict(enumerate(BAD_IMAGES.values(), start=2))
    trainer = trained(tmp_path, pairs_with(images), record_selection=True)
    bad = list(range(2, 2 + len(BAD_IMAGES)))
    summary = trainer.bad_rows.summary()
    problems = {entry["id"]: (entry["problem"], entry["path"]) for entry in summary.pop("problems")}
    assert set(problems) == set(bad) and problems[6] == ("no such file", "/nowhere/4711.jpg")
    assert "truncated" in problems[2][0] and "truncated" in problems[3][0] and problems[7] == ("no image", None)
    assert summary == {
        "count": len(bad),
        "reasons": {"image missing or undecodable": len(bad)},
        "ids": bad,
    }
    assert seen(trainer) == set(range(16)) - set(bad)
    recorded = datasets.Dataset.from_parquet(str(tmp_path / "selection.parquet"))
    assert set(recorded["sample_id"]) == seen(trainer) and trainer.state.global_step == 4


@pytest.mark.parametrize("family", ["tiny_siglip", "tiny_dual_encoder"])
@pytest.mark.parametrize("strategy", ["none", "random", "small_loss"])
def test_bad_rows_are_skipped_with_every_kind_of_model_and_scoring(family, strategy, tmp_path):
    data = pairs_with(dict.fromkeys((0, 5), b"broken"), {9: None})
    trainer = make_trainer(tmp_path, data, family, selection_strategy=strategy, selection_ratio=1.0)
    trainer.train()
    assert trainer.bad_rows.summary()["ids"] == [0, 5, 9] and weights(trainer).isfinite().all()
    assert seen(trainer) == set(range(16)) - {0, 5, 9}


# ---- captions ----


def test_bad_captions_are_skipped_and_counted_and_long_ones_cut(tmp_path):
    captions = {1: "", 2: None, 3: " \n ", 4: "red patch " * 3000, 5: "🙂 ünïcödé 红色", 6: "\x00\x01"}
    trainer = trained(tmp_path, pairs_with(captions=captions))
    assert trainer.bad_rows.summary() == {"count": 3, "reasons": {"caption missing or empty": 3}, "ids": [1, 2, 3]}
    assert seen(trainer) == set(range(16)) - {1, 2, 3}


def test_a_column_of_numbers_instead_of_captions_stops_at_once(tmp_path):
    data = tiny_models.tiny_pairs(16).remove_columns("caption").add_column("caption", list(range(16)))
    trainer = make_trainer(tmp_path, data, max_bad_fraction=0.01)
    with pytest.raises(TooManyBadRows, match=r"8 of 16 pairs cannot be read \(8 x caption not a string\)"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_captions_of_any_type_from_a_torch_data_set_are_skipped(tmp_path):
    captions = {0: 5, 1: b"red", 2: ["red"], 3: 0.5}
    rows = [
        {**pair, "caption": captions.get(index, pair["caption"])}
        for index, pair in enumerate(as_pairs(tiny_models.tiny_pairs(16)))
    ]
    trainer = trained(tmp_path, Rows(rows))
    assert trainer.bad_rows.summary() == {
        "count": 4,
        "reasons": {"caption not a string": 4},
        "ids": [0, 1, 2, 3],
        "problems": [
            {"id": 0, "problem": "int 5", "path": None},
            {"id": 1, "problem": "bytes b'red'", "path": None},
            {"id": 2, "problem": "list ['red']", "path": None},
            {"id": 3, "problem": "float 0.5", "path": None},
        ],
    }
    assert seen(trainer) == set(range(4, 16))


def test_missing_captions_among_several_are_pairs_of_their_own(tmp_path):
    data = pairs_with({7: b"broken"}, {0: [None, "red"], 1: [], 2: None, 3: ["", "blue", "x"]}, captions_per_image=2)
    trainer = trained(tmp_path, data)
    assert len(trainer.train_dataset) == 2 + 1 + 1 + 3 + 12 * 2
    # Numbered row by row: row 0 is pairs 0-1, row 1 pair 2, row 2 pair 3, row 3 pairs 4-6, row 7 pairs 13-14.
    assert trainer.bad_rows.summary()["ids"] == [0, 2, 3, 4, 13, 14]
    assert trainer.bad_rows.summary()["reasons"] == {"caption missing or empty": 4, "image missing or undecodable": 2}
    assert seen(trainer) == set(range(31)) - {0, 2, 3, 4, 13, 14}


HALF_A_PAIR = "a red patch \ud83d"


@pytest.mark.parametrize("kind", ["list", "torch", "stream of a generator", "stream of several captions"])
def test_a_caption_that_cannot_be_encoded_is_skipped_and_counted(kind, tmp_path):
    rows = tiny_models.tiny_pairs(16).to_list()
    rows[5]["caption"] = HALF_A_PAIR
    settings = STREAM if "stream" in kind else {}
    if kind == "list":
        data = rows
    elif kind == "torch":
        data = Rows([{**row, "sample_id": number} for number, row in enumerate(rows)])
    elif kind == "stream of a generator":
        data = datasets.IterableDataset.from_generator(lambda: iter(rows))
    else:
        rows = [{"image": row["image"], "captions": [row["caption"], "red"]} for row in rows]
        data = datasets.IterableDataset.from_generator(lambda: iter(rows))
    trainer = trained(tmp_path, data, **settings)
    summary = trainer.bad_rows.summary()
    assert summary["count"] == 1 and summary["reasons"] == {"caption cannot be encoded": 1}
    assert summary["problems"][0]["problem"] == r"a red patch \ud83d"
    assert len(seen(trainer)) == (31 if "several" in kind else 15)


# ---- how many, and where they are met ----


def test_too_many_bad_rows_stop_the_run_with_ids_and_reasons(tmp_path):
    trainer = make_trainer(tmp_path, pairs_with({3: b"broken"}, {11: None}), max_bad_fraction=0.1)
    with pytest.raises(TooManyBadRows) as caught:
        trainer.train()
    message = str(caught.value)
    assert "2 of 16 pairs cannot be read" in message and "max_bad_fraction=0.1" in message
    assert "1 x image missing or undecodable" in message and "1 x caption missing or empty" in message
    assert "3, 11" in message and "Mend the data, check the column names, or raise max_bad_fraction" in message


def test_too_many_bad_rows_leave_the_checkpoints(tmp_path):
    class BrokenLater(Rows):
        def __getitem__(self, index):
            broken = (tmp_path / "checkpoint-2").exists()
            return {**super().__getitem__(index), **({"image": None} if broken else {})}

    data = BrokenLater(list(as_pairs(tiny_models.tiny_pairs(16))))
    trainer = make_trainer(tmp_path, data, max_bad_fraction=0.01, save_strategy="epoch")
    with pytest.raises(TooManyBadRows, match="8 of 16 pairs cannot be read"):
        trainer.train()
    assert_loadable(tmp_path / "checkpoint-2", 16, arbitrary_ids=True)


def test_a_whole_batch_of_bad_rows_is_passed_over(tmp_path):
    data = pairs_with(dict.fromkeys(range(BATCH), b"broken"), num_rows=24)
    trainer = make_trainer(tmp_path, data, train_sampling_strategy="sequential")
    before, after = [], []
    select = trainer.selector.select

    def watch(model, batch, **keywords):
        (before if trainer.state.global_step == 0 else after).append(weights(trainer))
        return select(model, batch, **keywords)

    trainer.selector.select = watch
    trainer.train()
    assert trainer.state.global_step == 6 and seen(trainer) == set(range(BATCH, 24))
    # The step of the bad batch changes nothing; the next one trains.
    assert torch.equal(before[0], after[0]) and not torch.equal(after[0], after[1])


def test_bad_rows_are_counted_across_workers(tmp_path):
    data = pairs_with({3: b"broken", 12: None}, {8: None}, num_rows=32)
    trainer = trained(tmp_path, data, dataloader_num_workers=2)
    assert trainer.bad_rows.summary() == {
        "count": 3,
        "reasons": {"image missing or undecodable": 2, "caption missing or empty": 1},
        "ids": [3, 8, 12],
        "problems": trainer.bad_rows.summary()["problems"],
    }
    assert seen(trainer) == set(range(32)) - {3, 8, 12}


def test_bad_rows_are_counted_with_gradient_accumulation(tmp_path):
    data = pairs_with(dict.fromkeys(range(8), b"broken"), num_rows=32)
    trainer = trained(tmp_path, data, gradient_accumulation_steps=2)
    assert trainer.bad_rows.summary()["count"] == 8 and trainer.state.global_step == 4


def test_bad_rows_of_the_evaluation_are_left_out_of_its_figures(tmp_path):
    good = tiny_models.tiny_pairs(16, seed=1)
    mixed = datasets.concatenate_datasets([good, pairs_with({0: b"broken"}, {1: None}, num_rows=2)])
    trainer = make_trainer(tmp_path, tiny_models.tiny_pairs(16), eval_dataset=mixed)
    figures = {name: trainer.evaluate(data, metric_key_prefix="eval") for name, data in (("a", good), ("b", mixed))}
    kept = [name for name in figures["a"] if "_R@" in name or name.endswith(("recall_sum", "median_rank"))]
    assert len(kept) == 9 and all(figures["a"][name] == figures["b"][name] for name in kept)
    assert np.isfinite(figures["b"]["eval_loss"])


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_rows_of_a_stream_are_skipped_and_counted(workers, tmp_path):
    data = pairs_with({3: b"broken", 12: b""}, {8: None}, num_rows=32)
    stream = data.to_iterable_dataset(num_shards=4)
    trainer = trained(tmp_path, stream, dataloader_num_workers=workers, **STREAM)
    summary = trainer.bad_rows.summary()
    assert summary["count"] == 3 and summary["reasons"] == {
        "image missing or undecodable": 2,
        "caption missing or empty": 1,
    }
    assert len(seen(trainer)) == 29 and seen(trainer).isdisjoint(summary["ids"])


def test_a_stream_of_bad_rows_stops(tmp_path):
    stream = tiny_models.tiny_pairs(240).rename_column("caption", "title").to_iterable_dataset()
    stream = stream.map(lambda row: {"caption": None})
    trainer = make_trainer(tmp_path, stream, max_bad_fraction=0.01, max_steps=60)
    with pytest.raises(TooManyBadRows, match=r"104 of 104 pairs .*caption missing or empty.*max_bad_fraction=0\.01"):
        trainer.train()


# ---- data sets that cannot be used at all ----


class Rows(torch.utils.data.Dataset):
    """The plainest torch data set."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def with_ids(ids) -> Dataset:
    return tiny_models.tiny_pairs(len(ids)).add_column("key", ids)


UNUSABLE = {
    "empty": (tiny_models.tiny_pairs(4).select([]), {}, "train_dataset: The data set has no rows; check the path"),
    "empty list": ([], {}, "train_dataset: The data set has no rows"),
    "fewer pairs than a batch": (
        tiny_models.tiny_pairs(7),
        {},
        "train_dataset has 7 pairs, fewer than one batch of 8 candidates .* lower per_device_train_batch_size",
    ),
    "missing column": (
        tiny_models.tiny_pairs(16),
        {"caption_column": "alt_text"},
        "train_dataset: caption_column='alt_text': no such column; the data has image, caption",
    ),
    "unknown columns": (
        tiny_models.tiny_pairs(16).rename_column("caption", "alt_text"),
        {},
        "train_dataset: No column named caption .* the data has image, alt_text. Name yours with caption_column",
    ),
    "duplicate ids": (
        with_ids([*range(15), 3]),
        {"id_column": "key"},
        "train_dataset: id_column='key': 1 ids are not unique, first 3; .* leave id_column out to number the rows",
    ),
    "duplicate string ids": (
        with_ids(["a", *"abcdefghijklmno"]),
        {"id_column": "key"},
        "1 ids are not unique, first 'a'",
    ),
    "negative ids": (
        with_ids([*range(15), -3]),
        {"id_column": "key"},
        "train_dataset: id_column='key': id -3 is negative; ids are integers from 0 upwards",
    ),
    "missing ids": (with_ids([*range(15), None]), {"id_column": "key"}, "1 rows have no id; every row needs its own"),
    "choice of split": (
        datasets.DatasetDict(train=tiny_models.tiny_pairs(16)),
        {},
        "train_dataset: A DatasetDict holds several splits; pass one of them: 'train'",
    ),
    "torch data set without ids": (
        Rows([{"image": None, "caption": "a"}] * 16),
        {},
        "train_dataset: Rows yields without sample_id; .* A datasets.Dataset or a list of dicts needs no ids",
    ),
    "torch data set of tuples": (Rows([(1, "a")] * 16), {}, "train_dataset: Rows yields tuple"),
    "list of mixed captions": (
        [{"image": b"x", "caption": caption} for caption in ["a", 5] * 8],
        {},
        "train_dataset: The list of dicts does not make a table .* captions strings",
    ),
    "stream without max_steps": (
        tiny_models.tiny_pairs(16).to_iterable_dataset(),
        {},
        "max_steps has to be specified",
    ),
}


@pytest.mark.parametrize("case", list(UNUSABLE))
def test_unusable_data_is_told_before_training(case, tmp_path):
    data, settings, message = UNUSABLE[case]
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, data, **settings)


def test_an_unusable_evaluation_set_is_told_before_training(tmp_path):
    with pytest.raises(ValueError, match="eval_dataset: The data set has no rows"):
        make_trainer(tmp_path, tiny_models.tiny_pairs(16), eval_dataset=tiny_models.tiny_pairs(4).select([]))


def test_a_stream_without_rows_is_told(tmp_path):
    stream = tiny_models.tiny_pairs(16).to_iterable_dataset().filter(lambda row: False)
    trainer = make_trainer(tmp_path, stream, **STREAM)
    with pytest.raises(ValueError, match="The data set has no rows; check the path, the split and any filter"):
        trainer.train()
    assert not (tmp_path / "model.safetensors").exists()


def test_negative_ids_of_a_stream_are_told_by_name(tmp_path):
    trainer = make_trainer(tmp_path, with_ids([*range(15), -3]).to_iterable_dataset(), id_column="key", **STREAM)
    with pytest.raises(ValueError, match="id_column='key': id -3 is negative"):
        trainer.train()


@pytest.mark.parametrize("kind", ["list", "torch", "table with decoding"])
def test_other_usual_data_sets_are_fine(kind, tmp_path):
    data = tiny_models.tiny_pairs(16)
    data = {
        "list": lambda: [{"image": tiny_models.tiny_picture(i)[0], "text": "red"} for i in range(16)],
        "torch": lambda: Rows(list(as_pairs(data))),
        "table with decoding": lambda: data.cast_column("image", Image()).with_format("torch"),
    }[kind]()
    trainer = trained(tmp_path, data)
    assert seen(trainer) == set(range(16)) and len(trainer.bad_rows) == 0


# ---- arguments ----


@pytest.mark.parametrize("ratio", [0, 1.5, float("nan"), -1])
def test_an_impossible_ratio_is_told_before_training(ratio, tmp_path):
    with pytest.raises(ValueError, match=r"selection_ratio=\S+ is not allowed; allowed: a number,? in \(0, 1\]"):
        make_trainer(tmp_path, tiny_models.tiny_pairs(16), selection_ratio=ratio)


@pytest.mark.parametrize(("batch", "ratio"), [(8, 0.2), (3, 0.5), (2, 0.5)])
def test_a_ratio_that_leaves_fewer_than_two_pairs_is_told(batch, ratio, tmp_path):
    with pytest.raises(
        ValueError, match=f"selection_ratio={ratio} of per_device_train_batch_size={batch} keeps .*Raise"
    ):
        make_trainer(tmp_path, tiny_models.tiny_pairs(16), selection_ratio=ratio, per_device_train_batch_size=batch)


def test_plain_arguments_are_told(tmp_path):
    model, processor = tiny_models.tiny_clip()
    with pytest.raises(TypeError, match="args is TrainingArguments; pass hf_dissect.DissectTrainingArguments"):
        DissectTrainer(
            model=model,
            processing_class=processor,
            args=TrainingArguments(str(tmp_path)),
            train_dataset=tiny_models.tiny_pairs(16),
        )


def test_a_missing_processor_is_told(tmp_path):
    with pytest.raises(ValueError, match="processing_class is missing: pass the model's processor"):
        DissectTrainer(
            model=tiny_models.tiny_clip()[0],
            args=DissectTrainingArguments(str(tmp_path), **SETTINGS),
            train_dataset=tiny_models.tiny_pairs(16),
        )


def test_a_model_that_is_no_dual_encoder_is_told(tmp_path):
    bert = BertModel(BertConfig(**tiny_models.TRANSFORMER, vocab_size=20))
    with pytest.raises(ValueError, match="get_image_features"):
        make_trainer(tmp_path, tiny_models.tiny_pairs(16), model=bert)


def test_training_without_data_is_told(tmp_path):
    with pytest.raises(ValueError, match="train_dataset is missing"):
        make_trainer(tmp_path, None).train()


# ---- what was saved before is still there ----


def assert_loadable(folder, num_samples: int, arbitrary_ids: bool = False) -> None:
    assert AutoModel.from_pretrained(folder).num_parameters() > 0
    ledger = SampleLedger(None if arbitrary_ids else num_samples, columns=("correlation", "history"))
    ledger.load(folder / "ledger.safetensors")
    assert ledger.column("correlation").isfinite().sum() == num_samples


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_not_a_number_leaves_the_checkpoint_before_it(tmp_path):
    data = tiny_models.tiny_pairs(16)
    trainer = make_trainer(tmp_path, data, save_strategy="epoch")

    class Poison(torch.nn.Module):
        def forward(self, values):
            return values * torch.nan if trainer.state.global_step >= 2 else values

    poison = trainer.model.visual_projection.register_forward_hook(lambda _, __, values: Poison()(values))
    with pytest.raises(NonFiniteLossError, match=r"At step 2 .* not finite \(first sample ids: .*checkpoint-2"):
        trainer.train()
    poison.remove()
    assert weights(trainer).isfinite().all()
    assert_loadable(tmp_path / "checkpoint-2", 16)
    resumed = make_trainer(tmp_path, data)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4


@pytest.mark.parametrize("other", ["tiny_siglip", "tiny_dual_encoder", "wider"])
def test_a_checkpoint_of_another_model_is_told_and_left_alone(other, tmp_path):
    data = tiny_models.tiny_pairs(16)
    make_trainer(tmp_path, data, save_strategy="epoch").train()
    before = contents(tmp_path)
    family, model = (other, None) if other != "wider" else ("tiny_clip", wider_clip())
    with pytest.raises(
        ValueError, match=r"checkpoint-4.*(is of another model|holds a model of type clip).*start again"
    ):
        make_trainer(tmp_path, data, family, model=model).train(resume_from_checkpoint=True)
    assert contents(tmp_path) == before
    assert_loadable(tmp_path / "checkpoint-4", 16)


def wider_clip():
    config = tiny_models.tiny_clip()[0].config
    config.vision_config.intermediate_size *= 2
    return AutoModel.from_config(config)


@pytest.mark.parametrize("rows", [24, 8])
def test_a_checkpoint_of_other_data_is_told_and_left_alone(rows, tmp_path):
    make_trainer(tmp_path, tiny_models.tiny_pairs(16), save_strategy="epoch").train()
    before = contents(tmp_path)
    trainer = make_trainer(tmp_path, tiny_models.tiny_pairs(rows), num_train_epochs=20)
    with pytest.raises(ValueError, match=f"holds 16 pairs, this run has {rows} pairs: it belongs to another data set"):
        trainer.train(resume_from_checkpoint=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        ("model.safetensors", OSError, "model.safetensors.* cannot be read .*name an earlier checkpoint"),
        ("config.json", OSError, "no readable config.json"),
        ("ledger.safetensors", ValueError, "ledger.safetensors is not a readable safetensors file"),
    ],
)
def test_a_damaged_checkpoint_is_told(damage, error, message, tmp_path):
    data = tiny_models.tiny_pairs(16)
    make_trainer(tmp_path, data, save_strategy="epoch").train()
    file = tmp_path / "checkpoint-4" / damage
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(error, match=message):
        make_trainer(tmp_path, data).train(resume_from_checkpoint=True)
    assert_loadable(tmp_path / "checkpoint-2", 16)


@pytest.mark.parametrize("where", [True, "nowhere"])
def test_a_checkpoint_that_is_not_there_is_told(where, tmp_path):
    trainer = make_trainer(tmp_path, tiny_models.tiny_pairs(16))
    where = where if where is True else str(tmp_path / where)
    with pytest.raises((ValueError, OSError), match="No checkpoint to resume from|nowhere"):
        trainer.train(resume_from_checkpoint=where)


def test_errors_before_training_leave_an_earlier_run_alone(tmp_path):
    make_trainer(tmp_path, tiny_models.tiny_pairs(16), save_strategy="epoch", record_selection=True).train()
    before = contents(tmp_path)
    for data, settings, message in UNUSABLE.values():
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, data, record_selection=True, **settings)
    assert contents(tmp_path) == before and "selection.parquet" in before
    assert_loadable(tmp_path / "checkpoint-2", 16)


# ---- recipes ----


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file; shipped recipes: .*quickstart"),
        (b"", "is empty; a recipe needs at least a name"),
        (b"model: [unclosed", "line 1, column 17: while parsing"),
        (b"\xff\xfe\x00binary\x00", "not UTF-8 text; a recipe is a YAML file"),
        (b"- a\n- b\n", "a recipe is a mapping of sections"),
        (b"name: x\nselction: {}\n", "selction.*selection"),
        (b"name: x\nselection: {ratio: 1.5}\n", r"selection\.ratio.*1\.5"),
        (b"name: x\nselection: {ratio: .nan}\n", r"selection\.ratio.*nan"),
        (b"name: !!python/object/apply:os.getcwd []\n", "could not determine a constructor for the tag"),
    ],
)
def test_an_unreadable_recipe_is_told(content, message, tmp_path):
    path = tmp_path / "mine.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RecipeError, match=message) as caught:
        Recipe.load(path)
    assert "mine.yaml" in str(caught.value)


def test_a_folder_is_no_recipe(tmp_path):
    with pytest.raises(RecipeError, match=tmp_path.name):
        Recipe.load(tmp_path)


def test_a_processor_without_a_tokenizer_is_refused(tmp_path):
    model, processor = tiny_models.tiny_clip()
    with pytest.raises((TypeError, ValueError), match="tokenizer"):
        DissectTrainer(
            model=model,
            processing_class=processor.image_processor,
            train_dataset=tiny_models.tiny_pairs(32),
            args=DissectTrainingArguments(str(tmp_path)),
        )


def test_a_caption_length_beyond_the_model_is_refused(tmp_path):
    model, processor = tiny_models.tiny_clip()
    with pytest.raises(ValueError, match="max_caption_length=500 is beyond the 16 tokens"):
        DissectTrainer(
            model=model,
            processing_class=processor,
            train_dataset=tiny_models.tiny_pairs(32),
            args=DissectTrainingArguments(str(tmp_path), max_caption_length=500),
        )


def test_feature_vectors_for_a_model_of_pictures_are_refused(tmp_path):
    model, processor = tiny_models.tiny_clip()
    rows = Dataset.from_dict({"image_features": [[0.0, 1.0, 2.0]] * 16, "caption": ["a red patch"] * 16})
    with pytest.raises(ValueError, match=r"feature vectors of 3 numbers, the model \(CLIPModel\) reads pictures"):
        DissectTrainer(
            model=model,
            processing_class=processor,
            train_dataset=rows,
            args=DissectTrainingArguments(str(tmp_path), image_column="image_features"),
        )


def test_several_training_sets_are_refused(tmp_path):
    model, processor = tiny_models.tiny_clip()
    pairs = tiny_models.tiny_pairs(32)
    with pytest.raises(ValueError, match=r"train_dataset holds several data sets \(a, b\)"):
        DissectTrainer(
            model=model,
            processing_class=processor,
            train_dataset={"a": pairs, "b": pairs},
            args=DissectTrainingArguments(str(tmp_path)),
        )


def test_an_evaluation_set_that_can_no_longer_be_read_does_not_stop_training(tmp_path):
    class BrokenLater(Rows):
        def __getitem__(self, index):
            return {**super().__getitem__(index), **({"image": b"no image"} if started else {})}

    started: list[bool] = []
    trainer = make_trainer(
        tmp_path,
        tiny_models.tiny_pairs(32),
        eval_dataset=BrokenLater(list(as_pairs(tiny_models.tiny_pairs(8)))),
        eval_strategy="epoch",
        save_run_folder=True,
    )
    started.append(True)
    trainer.train()
    assert trainer.state.global_step == 8 and (tmp_path / "model.safetensors").is_file()
