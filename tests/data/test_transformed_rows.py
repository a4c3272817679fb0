"""A transform of the user is given all columns, decoded, and what it returns is trained on."""

import io
import pickle
import struct
import zlib

import datasets
import numpy as np
import pytest
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from testing import tiny_models

from hf_dissect import DissectTrainer, DissectTrainingArguments
from hf_dissect.data import as_pairs
from hf_dissect.data.images import UnusableImage


def table(num_rows: int = 6, captions_per_image: int = 1, **columns) -> Dataset:
    data = tiny_models.tiny_pairs(num_rows, captions_per_image=captions_per_image).cast_column("image", Image())
    for name, values in {
        "key": [f"k{row}" for row in range(num_rows)],
        "year": list(range(num_rows)),
        **columns,
    }.items():
        data = data.add_column(name, values)
    return data


def flip(batch: dict) -> dict:
    batch["image"] = [image.transpose(PILImage.Transpose.FLIP_LEFT_RIGHT) for image in batch["image"]]
    return batch


def test_a_transform_is_given_all_columns_decoded_and_its_output_is_the_pair():
    seen = []

    def shout(batch):
        seen.append({name: type(values[0]) for name, values in batch.items()})
        batch["caption"] = [
            f"{text.upper()} {year}" for text, year in zip(batch["caption"], batch["year"], strict=True)
        ]
        return flip(batch)

    data = table()
    pairs = as_pairs(data.with_transform(shout), sample_id="key")
    pair = pairs[3]
    assert set(seen[-1]) == {"image", "caption", "key", "year"} and issubclass(seen[-1]["image"], PILImage.Image)
    assert pair["caption"] == data[3]["caption"].upper() + " 3" and pair["key"] == "k3"
    assert np.array_equal(np.asarray(pair["image"]), np.asarray(data[3]["image"])[:, ::-1])
    assert pair["sample_id"] == as_pairs(data, sample_id="key")[3]["sample_id"]
    assert [pair["caption"][-1] for pair in pairs.__getitems__([5, 0, -1])] == ["5", "0", "5"]
    assert pickle.loads(pickle.dumps(as_pairs(data.with_transform(flip))))[0]["caption"] == data[0]["caption"]
    data.set_transform(flip)
    assert np.array_equal(np.asarray(as_pairs(data)[1]["image"]), np.asarray(data[1]["image"]))
    # People see the picture of the data.
    assert np.array_equal(np.asarray(pairs.picture(3)), np.asarray(table()[3]["image"].convert("RGB")))


def test_a_transform_of_several_captions_a_row_returns_all_or_one():
    data = table(4, captions_per_image=3)
    every = as_pairs(data.with_transform(lambda batch: flip({**batch, "captions": [
        [text + "!" for text in texts] for texts in batch["captions"]
    ]})))  # fmt: skip
    assert len(every) == 12 and [pair["caption"] for pair in every.__getitems__([0, 4, 11])] == [
        data[0]["captions"][0] + "!",
        data[1]["captions"][1] + "!",
        data[3]["captions"][2] + "!",
    ]
    one = as_pairs(
        data.with_transform(lambda batch: {**batch, "captions": [texts[-1] for texts in batch["captions"]]})
    )
    assert len(one) == 4 and one[2]["caption"] == data[2]["captions"][-1]


def test_a_transform_may_make_image_and_caption_of_other_columns(tmp_path):
    tiny_models.tiny_picture(4)[0].save(tmp_path / "4.png")
    data = Dataset.from_dict({"file": ["4.png"] * 3, "title": ["a", "b", "c"], "clean": [True, False, True]})

    def read(batch):
        images = [PILImage.open(tmp_path / name) for name in batch["file"]]
        return {"image": images, "caption": [f"photo of {title}" for title in batch["title"]]}

    pairs = as_pairs(data.with_transform(read))
    assert len(pairs) == 3 and pairs.knows_truth and pairs[1]["is_clean"] is False
    assert pairs[1]["caption"] == "photo of b" and pairs[1]["image"].size == tiny_models.tiny_picture(4)[0].size
    assert len(as_pairs(data.remove_columns("clean").with_transform(read))) == 3
    assert not list(pairs.captions())  # the table has none


def test_feature_vectors_of_a_transform_are_vectors():
    data = table(3, vector=[[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]])
    pairs = as_pairs(
        data.with_transform(lambda batch: {**batch, "vector": [2 * np.array(row) for row in batch["vector"]]}),
        image="vector",
    )
    assert pairs[2]["image"].tolist() == [8.0, 10.0]


def test_one_damaged_picture_is_a_bad_row_of_a_transform_and_its_own_faults_are_raised():
    rows = [{"bytes": picture(row), "path": None} for row in range(4)]
    rows[2] = {"bytes": picture(2)[:-300], "path": "2.png"}
    features = Features({"image": Image(), "caption": Value("string")})
    data = Dataset.from_dict({"image": rows, "caption": list("abcd")}, features=features)
    found = as_pairs(data.with_transform(flip)).__getitems__([3, 2, 1])
    assert [pair["caption"] for pair in found] == ["d", "c", "b"]
    assert isinstance(found[1]["image"], UnusableImage) and "2.png" in str(found[1]["image"])
    assert isinstance(found[0]["image"], PILImage.Image)
    assert isinstance(as_pairs(data.select([2, 0]).with_transform(flip))[0]["image"], UnusableImage)

    def fault(batch):
        if len(batch["image"]) > 1:
            raise KeyError("augmentation")
        return batch

    with pytest.raises(KeyError, match="augmentation"):
        as_pairs(data.with_transform(fault)).__getitems__([0, 1])


def test_damaged_side_data_do_not_cost_the_picture_of_a_transform():
    content = picture(1)
    text = b"zTXtnote\0\0" + zlib.compress(bytes(3_000_000))
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    rows = [{"bytes": picture(0), "path": None}, {"bytes": content[:33] + chunk + content[33:], "path": None}]
    features = Features({"image": Image(), "caption": Value("string")})
    data = Dataset.from_dict({"image": rows, "caption": ["a", "b"]}, features=features)
    image = as_pairs(data.with_transform(flip)).__getitems__([0, 1])[1]["image"]
    expected = np.asarray(PILImage.open(io.BytesIO(content)).convert("RGB"))[:, ::-1]
    assert np.array_equal(np.asarray(image.convert("RGB")), expected)


def picture(row: int) -> bytes:
    buffer = io.BytesIO()
    tiny_models.tiny_picture(row)[0].resize((64, 64)).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("transform", "names", "message"),
    [
        (lambda batch: {"pixel_values": batch["year"]}, {}, "No column named image_features or|image_column='image'"),
        (
            lambda batch: {"image": batch["image"]},
            {},
            "caption_column='caption': the transform .* returns image without",
        ),
        (
            lambda batch: {**batch, "made": batch["year"]},
            {"sample_id": "made"},
            "id_column='made': ids, tasks and truth",
        ),
        (lambda batch: {**batch, "caption": [["a"]] * len(batch["image"])}, {}, "returns lists as 'caption'"),
    ],
)
def test_a_transform_that_makes_no_pairs_is_refused(transform, names, message):
    with pytest.raises(ValueError, match=message):
        as_pairs(table().with_transform(transform), **names)


def test_a_transform_that_changes_the_number_of_rows_is_refused():
    pairs = as_pairs(table().with_transform(lambda batch: {name: values[:1] for name, values in batch.items()}))
    with pytest.raises(ValueError, match="returns 1 values of 'image' for 2 rows"):
        pairs.__getitems__([0, 1])


@pytest.mark.parametrize("kind", ["torch", "numpy", "arrow", "pandas"])
def test_other_formats_do_not_change_the_pairs(kind):
    data = table(4, captions_per_image=2)
    assert list(as_pairs(data.with_format(kind), sample_id="key")) == list(as_pairs(data, sample_id="key"))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_trains_on_what_the_transform_returns(workers, tmp_path):
    def grey(batch):
        batch["image"] = [PILImage.new("RGB", image.size, (90, 90, 90)) for image in batch["image"]]
        return batch

    model, processor = tiny_models.tiny_clip()
    seen = []

    class Watching(DissectTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            seen.append(inputs["pixel_values"])
            return super().training_step(model, inputs, num_items_in_batch)

    settings = dict(per_device_train_batch_size=8, max_steps=2, report_to="none", disable_tqdm=True)
    trainer = Watching(
        model=model,
        processing_class=processor,
        train_dataset=table(16).with_transform(grey),
        args=DissectTrainingArguments(
            str(tmp_path), dataloader_num_workers=workers, save_strategy="no", save_run_folder=False, **settings
        ),
    )
    trainer.train()
    assert len(seen) == 2 and all((pixels == pixels[:, :, :1, :1]).all() for pixels in seen)
    assert len(trainer.bad_rows) == 0


def test_lists_of_truth_need_the_list_of_captions():
    data = table(3, captions_per_image=2)
    data = data.add_column("clean", [[True, False]] * 3, feature=List(Value("bool")))
    assert [pair["is_clean"] for pair in as_pairs(data.with_transform(flip))] == [True, False] * 3
    with pytest.raises(ValueError, match="holds lists, but a row has one caption"):
        as_pairs(data.with_transform(lambda batch: {**batch, "captions": ["a"] * len(batch["captions"])}))


def test_streams_have_no_transform_and_are_mapped():
    stream = table(4).to_iterable_dataset().map(flip, batched=True, batch_size=2)
    assert isinstance(stream, datasets.IterableDataset) and len(list(as_pairs(stream))) == 4
