"""Image-text data: reading rows, turning them into pairs, and mismatching captions on purpose."""

from hf_dissect.data.absent_noise import replace_by_absent
from hf_dissect.data.loading import load_splits
from hf_dissect.data.neighbour_noise import exchange_between_neighbours
from hf_dissect.data.noise import apply_caption_order, load_caption_order, shuffle_captions
from hf_dissect.data.noun_noise import replace_nouns
from hf_dissect.data.pairs import PairColumns, PairDataset, PairStream, as_pairs
from hf_dissect.data.scenes.drawing import make_scene_classes, make_scenes, scenes_features, scenes_generator
from hf_dissect.data.scenes.grammar import SCENE_CLASSES, SCENE_TEMPLATES

__all__ = [
    "SCENE_CLASSES",
    "SCENE_TEMPLATES",
    "PairColumns",
    "PairDataset",
    "PairStream",
    "apply_caption_order",
    "as_pairs",
    "exchange_between_neighbours",
    "load_caption_order",
    "load_splits",
    "make_scene_classes",
    "make_scenes",
    "replace_by_absent",
    "replace_nouns",
    "scenes_features",
    "scenes_generator",
    "shuffle_captions",
]
