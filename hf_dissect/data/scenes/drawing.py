"""Draw pictures together with captions that describe them, so that real training needs no download."""

import io
import random
from collections.abc import Iterator
from typing import Any

from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as PillowImage
from PIL import ImageDraw

from hf_dissect.data.scenes.grammar import (
    BACKGROUNDS,
    COLOURS,
    COLUMNS,
    HELD_OUT_OBJECTS,
    LAYOUTS,
    ROWS,
    SCENE_CLASSES,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    describe,
    draw_scene,
)
from hf_dissect.data.scenes.styles import SCENE_STYLES, apply_style

SPLITS = ("train", "validation", "test")
HELD_OUT_SHARE = 0.25
"""Share of the test pictures that show a held-out combination."""

MIN_IMAGE_SIZE = 16

_COLOUR_RGB = {
    "red": (214, 39, 40),
    "orange": (255, 140, 0),
    "yellow": (250, 225, 40),
    "green": (30, 160, 50),
    "cyan": (40, 210, 220),
    "blue": (40, 70, 225),
    "purple": (130, 45, 160),
    "pink": (255, 125, 190),
}
_BACKGROUND_RGB = {"black": (12, 12, 12), "white": (245, 245, 245), "grey": (128, 128, 128), "brown": (98, 62, 34)}
_COLOUR_JITTER = 10  # levels of 255

# All lengths are shares of the picture's side.
_RADIUS = {"small": 0.125, "large": 0.22, None: 0.135}
_PLACE = {"top": 0.25, "middle": 0.5, "bottom": 0.75, "left": 0.25, "centre": 0.5, "right": 0.75}
_ALONG = {2: (0.26, 0.74), 3: (0.18, 0.5, 0.82)}
_POSITION_JITTER = 0.03

_OVERSAMPLING = 4
_SHARE_BY_OBJECTS = {1: 0.25, 2: 0.5, 3: 0.25}


def make_scenes(
    num_rows: int,
    *,
    seed: int = 0,
    image_size: int = 32,
    split: str = "train",
    captions_per_image: int = 1,
    tasks: int = 1,
) -> Dataset:
    """Draw a data set of scenes in memory.

    Row i depends only on the seed, the split and i: a longer data set begins with the shorter one, and the pictures do
    not change with the number of captions. Train and validation never show a held-out combination; a share of the test
    pictures, `HELD_OUT_SHARE`, does.

    Args:
        num_rows: Number of pictures.
        seed: Different seeds give different data sets.
        image_size: Width and height in pixels, at least 16.
        split: "train", "validation" or "test".
        captions_per_image: With 1 the captions are strings in `caption`, with more they are lists in `captions`.
        tasks: With more than 1 the pictures take turns in that many of `SCENE_STYLES`, their tasks.

    Returns:
        Columns `image` (PNG bytes, `Image(decode=False)`), `caption` or `captions`, `held_out` (bool), and with
        several tasks `task` (`ClassLabel` named by `SCENE_STYLES`).

    Raises:
        ValueError: If an argument is out of its range.
    """
    rows = list(scenes_generator(num_rows, seed, image_size, split, captions_per_image, tasks))
    features = scenes_features(captions_per_image, tasks)
    return Dataset.from_dict({name: [row[name] for row in rows] for name in features}, features=features)


def scenes_generator(
    num_rows: int | None = None,
    seed: int = 0,
    image_size: int = 32,
    split: str = "train",
    captions_per_image: int = 1,
    tasks: int = 1,
) -> Iterator[dict[str, Any]]:
    """Yield the rows of `make_scenes` one by one, without end if `num_rows` is None.

    To stream them: `IterableDataset.from_generator(scenes_generator, gen_kwargs=..., features=scenes_features())`.

    Raises:
        ValueError: If an argument is out of its range.
    """
    _check_arguments(num_rows, seed, image_size, split, captions_per_image, tasks)
    row = 0
    while num_rows is None or row < num_rows:
        rng = random.Random(f"{seed}/{split}/{row}")
        scene = _draw_allowed(rng, split)
        image = {"bytes": render(scene, image_size, rng, SCENE_STYLES[row % tasks]), "path": None}
        captions = describe(scene, captions_per_image, rng)
        text = {"caption": captions[0]} if captions_per_image == 1 else {"captions": captions}
        task = {"task": row % tasks} if tasks > 1 else {}
        yield {"image": image, **text, "held_out": scene.held_out, **task}
        row += 1


def scenes_features(captions_per_image: int = 1, tasks: int = 1) -> Features:
    """Return the features of the rows of `scenes_generator`."""
    text = {"caption": Value("string")} if captions_per_image == 1 else {"captions": List(Value("string"))}
    task = {"task": ClassLabel(names=list(SCENE_STYLES[:tasks]))} if tasks > 1 else {}
    return Features({"image": Image(decode=False), **text, "held_out": Value("bool"), **task})


def make_scene_classes(num_rows: int, *, seed: int = 0, image_size: int = 32, split: str = "test") -> Dataset:
    """Draw pictures of one object each, for zero-shot classification.

    Classes take turns, which balances them. Train and validation leave out the held-out classes.

    Returns:
        Columns `image` (as in `make_scenes`), `label` (`ClassLabel` named by `SCENE_CLASSES`), `held_out` (bool).

    Raises:
        ValueError: If an argument is out of its range.
    """
    _check_arguments(num_rows, seed, image_size, split, 1)
    classes = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    shown = [pair for pair in classes if split == "test" or pair not in HELD_OUT_OBJECTS]
    columns: dict[str, list[Any]] = {"image": [], "label": [], "held_out": []}
    for row in range(num_rows):
        rng = random.Random(f"{seed}/{split}/{row}/class")
        colour, shape = shown[row % len(shown)]
        item = SceneObject(shape, colour, rng.choice(SIZES))
        scene = Scene((item,), LAYOUTS[0], rng.choice(BACKGROUNDS), (rng.choice(ROWS), rng.choice(COLUMNS)))
        columns["image"].append({"bytes": render(scene, image_size, rng), "path": None})
        columns["label"].append(classes.index((colour, shape)))
        columns["held_out"].append(scene.held_out)
    features = {
        "image": Image(decode=False),
        "label": ClassLabel(names=list(SCENE_CLASSES)),
        "held_out": Value("bool"),
    }
    return Dataset.from_dict(columns, features=Features(features))


def render(scene: Scene, image_size: int, rng: random.Random, style: str = "plain") -> bytes:
    """Draw a scene; `rng` varies positions and colours by less than what the caption distinguishes.

    Args:
        scene: Objects and their layout.
        image_size: Width and height in pixels.
        rng: Source of the variation.
        style: One of `SCENE_STYLES`.

    Returns:
        A PNG file of `image_size` x `image_size` pixels, RGB.
    """
    side = image_size * _OVERSAMPLING
    ground = _vary(_BACKGROUND_RGB[scene.background], rng)
    picture = PillowImage.new("RGB", (side, side), ground)
    draw = ImageDraw.Draw(picture)
    for item, centre in zip(scene.objects, _place_objects(scene), strict=True):
        x, y = ((share + rng.uniform(-_POSITION_JITTER, _POSITION_JITTER)) * side for share in centre)
        _draw_shape(draw, item.shape, x, y, _RADIUS[item.size] * side, _vary(_COLOUR_RGB[item.colour], rng), ground)
    file = io.BytesIO()
    apply_style(picture.reduce(_OVERSAMPLING), style, rng).save(file, "PNG", compress_level=1)
    return file.getvalue()


def _draw_allowed(rng: random.Random, split: str) -> Scene:
    """Draw a scene that the split may show."""
    held_out = split == "test" and rng.random() < HELD_OUT_SHARE
    number = rng.choices(list(_SHARE_BY_OBJECTS), list(_SHARE_BY_OBJECTS.values()))[0]
    while True:
        scene = draw_scene(number, rng)
        if scene.held_out == held_out:
            return scene


def _place_objects(scene: Scene) -> list[tuple[float, float]]:
    if scene.place:
        row, column = scene.place
        return [(_PLACE[column], _PLACE[row])]
    return [(share, 0.5) if scene.layout == "left of" else (0.5, share) for share in _ALONG[len(scene.objects)]]


def _draw_shape(
    draw: ImageDraw.ImageDraw,
    shape: str,
    x: float,
    y: float,
    r: float,
    colour: tuple[int, ...],
    ground: tuple[int, ...],
) -> None:
    if shape in ("circle", "ring"):
        draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
        if shape == "ring":
            hole = 0.55 * r
            draw.ellipse((x - hole, y - hole, x + hole, y + hole), fill=ground)
    elif shape == "square":
        half = 0.88 * r
        draw.rectangle((x - half, y - half, x + half, y + half), fill=colour)
    elif shape == "triangle":
        draw.polygon(((x, y - r), (x + r, y + 0.85 * r), (x - r, y + 0.85 * r)), fill=colour)
    elif shape == "diamond":
        draw.polygon(((x, y - 1.1 * r), (x + 0.8 * r, y), (x, y + 1.1 * r), (x - 0.8 * r, y)), fill=colour)
    else:
        arm = 0.32 * r
        draw.rectangle((x - r, y - arm, x + r, y + arm), fill=colour)
        draw.rectangle((x - arm, y - r, x + arm, y + r), fill=colour)


def _vary(colour: tuple[int, int, int], rng: random.Random) -> tuple[int, ...]:
    return tuple(min(255, max(0, value + rng.randint(-_COLOUR_JITTER, _COLOUR_JITTER))) for value in colour)


def _check_arguments(
    num_rows: int | None, seed: int, image_size: int, split: str, captions_per_image: int, tasks: int = 1
) -> None:
    if split not in SPLITS:
        raise ValueError(f"split must be one of {list(SPLITS)}, got {split!r}.")
    checks = {
        "num_rows": (0 if num_rows is None else num_rows, 0),
        "seed": (seed, None),
        "image_size": (image_size, MIN_IMAGE_SIZE),
        "captions_per_image": (captions_per_image, 1),
        "tasks": (tasks, 1),
    }
    for name, (value, least) in checks.items():
        if isinstance(value, bool) or not isinstance(value, int) or (least is not None and value < least):
            allowed = "an integer" if least is None else f"an integer of at least {least}"
            raise ValueError(f"{name} must be {allowed}, got {value!r}.")
    if tasks > len(SCENE_STYLES):
        raise ValueError(f"tasks must be at most {len(SCENE_STYLES)}, the number of styles, got {tasks}.")
