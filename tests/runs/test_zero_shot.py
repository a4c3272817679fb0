"""Names of classes are compared with the labels of the data before anything is trained."""

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage
from testing.tiny_recipe import tiny_recipe

from hf_dissect.recipe.recipe import RecipeError
from hf_dissect.runs.run import run_recipe
from hf_dissect.runs.zero_shot import check_class_names, load_labelled_images


def table(labels, feature) -> Dataset:
    images = [PILImage.fromarray(np.full((8, 8, 3), 9 * number, np.uint8)) for number in range(len(labels))]
    return Dataset.from_dict(
        {"image": images, "label": labels}, features=Features({"image": Image(), "label": feature})
    )


NUMBERED = ClassLabel(names=["cat", "dog", "red_fox"])
TEXT = Value("string")


@pytest.mark.parametrize(
    ("feature", "classes"),
    [
        (NUMBERED, ["cat", "dog", "red_fox"]),
        (NUMBERED, ["dog", "red_fox", "cat"]),  # matched by name
        (NUMBERED, ["Cat", "Dog", "red fox"]),  # in the order of the labels
        (NUMBERED, ["Katze", "Hund", "Fuchs"]),
        (TEXT, ["red_fox", "dog", "cat", "cow"]),
        (Value("int64"), ["Dog", "cat", "fox"]),
    ],
)
def test_sound_names(feature, classes):
    labels = [0, 1, 2] if feature != TEXT else ["cat", "dog", "red_fox"]
    check_class_names(table(labels, feature), classes, "label")


@pytest.mark.parametrize(
    ("feature", "classes", "name", "written"),
    [
        (NUMBERED, ["Dog", "Cat", "red_fox"], "Dog", "write 'dog'"),
        (NUMBERED, ["dog", "Katze", "red_fox"], "dog", "have 'cat'"),
        (NUMBERED, ["red fox", "dog", "cow"], "red fox", "write 'red_fox'"),
        (TEXT, ["Dog", "cat", "red_fox"], "Dog", "write 'dog'"),
        (TEXT, ["cat", "dog", "Red Fox"], "Red Fox", "write 'red_fox'"),
    ],
)
def test_names_in_another_case_or_order_are_refused(feature, classes, name, written):
    labels = [0, 1, 2] if feature == NUMBERED else ["cat", "dog", "red_fox"]
    with pytest.raises(ValueError, match=f"class_names has '{name}'.*{written}; .*cat, dog, red_fox"):
        check_class_names(table(labels, feature), classes, "label")


def test_labels_that_differ_by_case_alone_are_two():
    check_class_names(table(["Dog", "dog", "cat"], TEXT), ["dog", "Dog", "cat"], "label")


def make_recipe(folder, data, **zero_shot):
    data.to_parquet(folder / "labelled.parquet")
    section = {"classes": ["cat", "dog"], "source": "folder", "path": str(folder / "labelled.parquet"), **zero_shot}
    return tiny_recipe(folder / "run", evaluation={"zero_shot": section})


def test_images_of_which_none_can_be_read_are_refused(tmp_path):
    rows = {"image": [{"bytes": b"none", "path": None}] * 20, "label": ["cat"] * 20}
    data = Dataset.from_dict(rows, features=Features({"image": Image(decode=False), "label": TEXT}))
    recipe = make_recipe(tmp_path, data.cast_column("image", Image()))
    with pytest.raises(ValueError, match="evaluation.zero_shot.image_column .*none of the first 16 images"):
        run_recipe(recipe)
    assert not (tmp_path / "run").exists()


def test_one_bad_image_is_not_a_fault(tmp_path):
    good = table(["cat", "dog"], TEXT).cast_column("image", Image(decode=False))
    data = Dataset.from_list(
        [{"image": {"bytes": b"none", "path": None}, "label": "cat"}, *good], features=good.features
    )
    recipe = make_recipe(tmp_path, data.cast_column("image", Image()))
    assert len(load_labelled_images(recipe.evaluation.zero_shot, recipe)) == 3


def test_the_usual_split_of_data_without_splits_is_all_of_them(tmp_path):
    recipe = make_recipe(tmp_path, table(["cat", "dog"], TEXT))
    assert len(load_labelled_images(recipe.evaluation.zero_shot, recipe)) == 2
    recipe = make_recipe(tmp_path, table(["cat", "dog"], TEXT), split="validation")
    with pytest.raises(ValueError, match="evaluation.zero_shot.split 'validation'"):
        load_labelled_images(recipe.evaluation.zero_shot, recipe)


def test_labelled_images_in_a_table_that_needs_settings(tmp_path):
    (tmp_path / "pictures").mkdir()
    for place in range(4):
        PILImage.new("RGB", (8, 8), (60 * place, 0, 0)).save(tmp_path / "pictures" / f"{place}.png")
    lines = ["image;label", *(f"{place}.png;{('Größe', 'dog')[place % 2]}" for place in range(4))]
    (tmp_path / "labelled.csv").write_bytes("\n".join(lines).encode("cp1252"))
    section = {"classes": ["Größe", "dog"], "source": "folder", "path": str(tmp_path / "labelled.csv")}
    read = {"separator": ";", "encoding": "cp1252", "image_root": str(tmp_path / "pictures")}
    recipe = tiny_recipe(tmp_path / "run", evaluation={"zero_shot": {**section, **read}})
    rows = load_labelled_images(recipe.evaluation.zero_shot, recipe)
    assert list(rows["label"]) == ["Größe", "dog"] * 2
    recipe = tiny_recipe(tmp_path / "run", evaluation={"zero_shot": {**section, **read, "image_root": "nowhere"}})
    with pytest.raises(FileNotFoundError, match="evaluation.zero_shot.image_root 'nowhere': .* is not a folder"):
        load_labelled_images(recipe.evaluation.zero_shot, recipe)
    for wrong, message in (
        ({**read, "separator": ";;"}, "evaluation.zero_shot.separator: ';;' is not allowed"),
        ({**read, "source": "hub", "image_root": None}, "evaluation.zero_shot.separator: ';' is only for .*folder"),
    ):
        with pytest.raises(RecipeError, match=message):
            tiny_recipe(tmp_path / "run", evaluation={"zero_shot": {**section, **wrong}})
