import io
import itertools
import random
import time

import numpy as np
import pytest
from datasets import Dataset, Image, IterableDataset
from PIL import Image as PillowImage

from hf_dissect.data.scenes import grammar as grammar
from hf_dissect.data.scenes.drawing import make_scene_classes, make_scenes, render, scenes_features, scenes_generator
from hf_dissect.data.scenes.grammar import SCENE_CLASSES, SCENE_TEMPLATES, Scene, SceneObject, describe


def pixels(row):
    return np.asarray(PillowImage.open(io.BytesIO(row["image"]["bytes"])))


def objects_told(caption):
    """(colour, shape) pairs a caption names, in the order of the text."""
    words = caption.replace(",", "").split()
    return [(a, b) for a, b in itertools.pairwise(words) if a in grammar.COLOURS and b in grammar.SHAPES]


def first_to_last(caption):
    """Shapes from left to right or from top to bottom, and the relation, read from the caption's words."""
    shapes = [shape for _, shape in objects_told(caption)]
    if any(word in caption for word in ("right of", "below", "under")):
        shapes.reverse()
    side_by_side = any(word in caption for word in ("left of", "right of", "from left", "on the left"))
    return shapes, "left of" if side_by_side else "above"


def told_held_out(caption):
    if set(objects_told(caption)) & grammar.HELD_OUT_OBJECTS:
        return True
    shapes, layout = first_to_last(caption)
    return any((a, layout, b) in grammar.HELD_OUT_RELATIONS for a, b in itertools.combinations(shapes, 2))


def test_columns_and_pictures():
    scenes = make_scenes(6, image_size=40)
    assert isinstance(scenes, Dataset)
    assert scenes.column_names == ["image", "caption", "held_out"]
    assert scenes.features["image"] == Image(decode=False)
    assert all(pixels(row).shape == (40, 40, 3) for row in scenes)
    several = make_scenes(6, image_size=40, captions_per_image=20)
    assert [len(captions) for captions in several["captions"]] == [20] * 6
    assert several["image"] == scenes["image"]
    for captions in several["captions"]:
        assert len(set(captions)) >= 8
        assert len({frozenset(objects_told(caption)) for caption in captions}) == 1


def test_rows_depend_on_seed_split_and_number_only():
    short, long = make_scenes(20, seed=4), make_scenes(50, seed=4)
    assert long.select(range(20)).to_list() == short.to_list()
    assert make_scenes(20, seed=5)["caption"] != short["caption"]
    assert make_scenes(20, seed=4, split="validation")["caption"] != short["caption"]
    assert list(itertools.islice(scenes_generator(seed=4), 20)) == short.to_list()


@pytest.mark.parametrize("split", ["train", "validation"])
def test_training_never_sees_a_held_out_combination(split):
    scenes = make_scenes(600, image_size=16, split=split)
    assert not any(scenes["held_out"])
    assert not any(told_held_out(caption) for caption in scenes["caption"])


def test_a_share_of_the_test_pictures_is_held_out_as_the_captions_tell():
    scenes = make_scenes(800, image_size=16, split="test")
    assert scenes["held_out"] == [told_held_out(caption) for caption in scenes["caption"]]
    # 0.25 +- four standard deviations of a share of 800
    assert abs(np.mean(scenes["held_out"]) - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 800)


def test_every_part_of_a_held_out_combination_is_trained():
    told = {pair for caption in make_scenes(600, image_size=16)["caption"] for pair in objects_told(caption)}
    expected = set(itertools.product(grammar.COLOURS, grammar.SHAPES)) - grammar.HELD_OUT_OBJECTS
    assert told == expected


def test_captions_of_512_pictures_are_nearly_all_different():
    captions = make_scenes(512, split="test")["caption"]
    assert len(set(captions)) >= 508


@pytest.mark.parametrize("layout", ["left of", "above"])
def test_picture_and_caption_agree_on_what_is_where(layout):
    scene = Scene((SceneObject("square", "red", "large"), SceneObject("circle", "blue", "small")), layout, "black")
    picture = np.asarray(PillowImage.open(io.BytesIO(render(scene, 32, random.Random(0))))).astype(int)
    red = np.argwhere((picture[..., 0] > 150) & (picture[..., 2] < 100))
    blue = np.argwhere((picture[..., 2] > 150) & (picture[..., 0] < 100))
    axis = 1 if layout == "left of" else 0
    assert red[:, axis].max() < blue[:, axis].min()
    assert len(red) > 2 * len(blue) > 20
    for caption in describe(scene, 30, random.Random(1)):
        assert first_to_last(caption) == (["square", "circle"], layout)
        assert "black" in caption


def test_single_object_is_where_the_caption_says():
    scene = Scene((SceneObject("square", "yellow", "small"),), "above", "grey", ("bottom", "left"))
    picture = np.asarray(PillowImage.open(io.BytesIO(render(scene, 32, random.Random(0))))).astype(int)
    rows, columns = np.nonzero((picture[..., 0] > 200) & (picture[..., 2] < 100))
    assert rows.mean() > 20 and columns.mean() < 12
    assert all("bottom left" in caption for caption in describe(scene, 10, random.Random(0)))


def test_classes_are_balanced_and_named():
    classes = make_scene_classes(96)
    names = classes.features["label"].names
    assert names == list(SCENE_CLASSES) and len(names) == 48
    assert sorted(classes["label"]) == sorted(list(range(48)) * 2)
    held_out = {" ".join(pair) for pair in grammar.HELD_OUT_OBJECTS}
    assert classes["held_out"] == [names[label] in held_out for label in classes["label"]]
    trained = make_scene_classes(84, split="train")
    assert {names[label] for label in trained["label"]} == set(names) - held_out
    assert all(template.count("{}") == 1 for template in SCENE_TEMPLATES)


def test_streaming():
    stream = IterableDataset.from_generator(
        scenes_generator, features=scenes_features(), gen_kwargs={"num_rows": 5, "split": "test"}
    )
    assert list(stream) == make_scenes(5, split="test").to_list()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_rows": -1}, "num_rows must be an integer of at least 0, got -1"),
        ({"num_rows": 2.0}, "num_rows"),
        ({"split": "dev"}, "split must be one of .*train.*got 'dev'"),
        ({"image_size": 8}, "image_size must be an integer of at least 16, got 8"),
        ({"captions_per_image": 0}, "captions_per_image"),
        ({"seed": None}, "seed must be an integer, got None"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_scenes(**{"num_rows": 2, **arguments})


def test_no_rows():
    assert len(make_scenes(0)) == 0


def test_speed():
    start = time.perf_counter()
    make_scenes(1000)
    assert time.perf_counter() - start < 2.0


def test_tasks_take_turns_in_styles_that_pictures_tell():
    plain, mixed = make_scenes(12, image_size=32), make_scenes(12, image_size=32, tasks=4)
    assert mixed["task"] == [0, 1, 2, 3] * 3
    assert mixed.features["task"].names == ["plain", "negative", "swapped", "noisy"]
    assert mixed.features == scenes_features(tasks=4)
    inner = slice(2, -2)  # the frame is a sixteenth of 32 pixels wide
    for before, after in zip(plain, mixed, strict=True):
        old, new = pixels(before).astype(int), pixels(after).astype(int)
        expected = {0: old, 1: 255 - old, 2: old[..., [2, 0, 1]]}
        if after["task"] in expected:
            assert (new[inner, inner] == expected[after["task"]][inner, inner]).all()
        else:
            assert 20 < np.abs(new - old)[inner, inner].mean() < 80
        frame = np.concatenate([new[:2].reshape(-1, 3), new[:, -2:].reshape(-1, 3)])
        if after["task"]:
            assert (frame == {1: 70, 2: 160, 3: 220}[after["task"]]).all()
    assert set(objects_told(mixed[1]["caption"])) == set(objects_told(plain[1]["caption"]))
    stream = IterableDataset.from_generator(
        scenes_generator, features=scenes_features(tasks=2), gen_kwargs={"num_rows": 4, "tasks": 2}
    )
    assert [row["task"] for row in stream] == [0, 1, 0, 1]


@pytest.mark.parametrize("tasks", [0, 5, 1.0, True])
def test_an_impossible_number_of_tasks_is_refused(tasks):
    with pytest.raises(ValueError, match="tasks must be"):
        make_scenes(4, tasks=tasks)
