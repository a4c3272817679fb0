"""Define what a scene consists of and how captions word it, so that a caption describes what is drawn."""

import random
from dataclasses import dataclass

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SIZES = ("small", "large")
BACKGROUNDS = ("black", "white", "grey", "brown")
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "centre", "right")
LAYOUTS = ("left of", "above")

HELD_OUT_OBJECTS = frozenset(
    {
        ("red", "triangle"),
        ("orange", "ring"),
        ("green", "circle"),
        ("blue", "square"),
        ("purple", "diamond"),
        ("pink", "cross"),
    }
)
"""Pairs (colour, shape) that occur in test pictures only."""

HELD_OUT_RELATIONS = frozenset(
    {
        ("circle", "left of", "square"),
        ("triangle", "left of", "ring"),
        ("diamond", "above", "cross"),
        ("square", "above", "circle"),
    }
)
"""Triples (shape, relation, shape) that occur in test pictures only, in any wording of the caption."""

SCENE_CLASSES = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
"""Class names of one-object pictures, by label."""

SCENE_TEMPLATES = (
    "a large {} in the centre on a black background",
    "a large {} in the centre on a white background",
    "a small {} in the centre on a grey background",
    "a small {} at the top on a brown background",
    "a large {} at the bottom on a black background",
    "a small {} on the left on a white background",
    "a large {} on the right on a grey background",
)
"""Zero-shot templates in the wording of the captions; `{}` is a name of `SCENE_CLASSES`."""

_SIZE_WORDS = {"small": ("small", "small", "little"), "large": ("large", "large", "big")}
_PLACES = {
    ("top", "left"): ("in the top left corner", "at the top left"),
    ("top", "centre"): ("at the top", "at the top centre"),
    ("top", "right"): ("in the top right corner", "at the top right"),
    ("middle", "left"): ("on the left", "on the left side"),
    ("middle", "centre"): ("in the centre", "in the middle"),
    ("middle", "right"): ("on the right", "on the right side"),
    ("bottom", "left"): ("in the bottom left corner", "at the bottom left"),
    ("bottom", "centre"): ("at the bottom", "at the bottom centre"),
    ("bottom", "right"): ("in the bottom right corner", "at the bottom right"),
}
_ONE = ("{a} {place}", "there is {a} {place}", "{place}, {a}")
_TWO = {
    "left of": (
        "{a} left of {b}",
        "{a} to the left of {b}",
        "{b} right of {a}",
        "{b} to the right of {a}",
        "{a} on the left and {b} on the right",
    ),
    "above": (
        "{a} above {b}",
        "{a} over {b}",
        "{b} below {a}",
        "{b} under {a}",
        "{a} at the top and {b} at the bottom",
    ),
}
_THREE = {
    "left of": ("{a}, {b} and {c} from left to right", "{a} left of {b} left of {c}", "{c} right of {b} right of {a}"),
    "above": ("{a}, {b} and {c} from top to bottom", "{a} above {b} above {c}", "{c} below {b} below {a}"),
}
_GROUNDS = ("{scene} on a {ground} background", "{scene}, {ground} background", "on {ground}, {scene}")


@dataclass(frozen=True)
class SceneObject:
    """One shape of a scene; `size` is None if the caption does not mention it."""

    shape: str
    colour: str
    size: str | None = None


@dataclass(frozen=True)
class Scene:
    """Content of a picture, as its caption describes it.

    Attributes:
        objects: One to three objects, from left to right or from top to bottom.
        layout: "left of" (side by side) or "above" (one below the other); ignored for one object.
        background: One of `BACKGROUNDS`.
        place: Row and column of a single object, from `ROWS` and `COLUMNS`; None for several objects.
    """

    objects: tuple[SceneObject, ...]
    layout: str
    background: str
    place: tuple[str, str] | None = None

    @property
    def held_out(self) -> bool:
        """True if the scene shows a combination that training never sees."""
        shapes = [item.shape for item in self.objects]
        relations = {(first, self.layout, second) for i, first in enumerate(shapes) for second in shapes[i + 1 :]}
        pairs = {(item.colour, item.shape) for item in self.objects}
        return bool(HELD_OUT_OBJECTS & pairs or HELD_OUT_RELATIONS & relations)


def draw_scene(number: int, rng: random.Random) -> Scene:
    """Draw a scene of `number` objects (1 to 3) at random; it may show a held-out combination."""
    objects = tuple(
        SceneObject(rng.choice(SHAPES), rng.choice(COLOURS), rng.choice(SIZES) if number < 3 else None)
        for _ in range(number)
    )
    place = (rng.choice(ROWS), rng.choice(COLUMNS)) if number == 1 else None
    return Scene(objects, rng.choice(LAYOUTS), rng.choice(BACKGROUNDS), place)


def describe(scene: Scene, count: int, rng: random.Random) -> list[str]:
    """Return `count` captions that describe the whole scene, in different phrasings as long as there are enough."""
    frames: tuple[str, ...] = _ONE
    if not scene.place:
        frames = (_TWO if len(scene.objects) == 2 else _THREE)[scene.layout]
    phrasings = [(frame, ground) for frame in frames for ground in _GROUNDS]
    captions: list[str] = []
    while len(captions) < count:
        chosen = rng.sample(phrasings, min(len(phrasings), count - len(captions)))
        captions += [_word_scene(scene, frame, ground, rng) for frame, ground in chosen]
    return captions


def _word_scene(scene: Scene, frame: str, ground: str, rng: random.Random) -> str:
    names = dict(zip("abc", (_name_object(item, rng) for item in scene.objects), strict=False))
    place = rng.choice(_PLACES[scene.place]) if scene.place else None
    return ground.format(scene=frame.format(place=place, **names), ground=scene.background)


def _name_object(item: SceneObject, rng: random.Random) -> str:
    if item.size:
        return f"a {rng.choice(_SIZE_WORDS[item.size])} {item.colour} {item.shape}"
    return f"{'an' if item.colour[0] in 'aeiou' else 'a'} {item.colour} {item.shape}"
