"""The settings of distillation.py: their rows, recipes, and how their students are scored."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

from hf_dissect.distillation import DistillationTrainer, recall_at_1

Splits = dict[str, dict[str, Any]]
TRAINED, TESTED = [1, 3, 5, 7], [2, 4, 6, 8]
"""Subjects of UTD-MHAD."""
SCENES, ALIKE = 30, 0.35
"""Number of kinds of scene, and the tf-idf cosine of the captions from which two photographs count as alike."""
CAPTIONS = "captions.npz"


@dataclasses.dataclass(frozen=True)
class Setting:
    """Rows, recipe and figure of a setting.

    Attributes:
        recipe: Shipped recipe, or its settings.
        overrides: Changes of the recipe.
        read: Function of the folder, the split to evaluate on and the seed; it returns the splits `train` and
            `evaluated`, with the classes of all rows.
        keeps_label: Function of the training columns; it returns the rows that keep their label, bool `(n,)`.
        score: Function of trainer and splits; it returns the figures.
        decides: Name of the figure that decides.
        score_inputs: Function of the splits; it returns the figures of what the student reads, without training.
    """

    recipe: str | dict[str, Any]
    overrides: tuple[str, ...]
    read: Callable[[Path, str, int], Splits]
    keeps_label: Callable[[Mapping[str, Any]], np.ndarray]
    score: Callable[[DistillationTrainer, Splits], dict[str, float]]
    decides: str
    score_inputs: Callable[[Splits], dict[str, float]] | None = None


# ---- UTD-MHAD ----


def read_utd(folder: Path, split: str, seed: int) -> Splits:
    """Rows of the subjects that train, and of those that are evaluated; for validation, by the seed."""
    path = folder if folder.is_file() else next(folder.glob("*.npz"))
    with np.load(path) as stored:
        arrays = {name: stored[name] for name in stored.files}
    depth = torch.from_numpy(arrays["depth"]).float()
    arrays["depth"] = torch.nn.functional.avg_pool2d(depth, 4).half().numpy()
    evaluated = TESTED if split == "test" else [TRAINED[-1 - seed % len(TRAINED)]]
    trained = [subject for subject in TRAINED if subject not in evaluated]
    rows = {"train": np.isin(arrays["subject"], trained), "evaluated": np.isin(arrays["subject"], evaluated)}
    return {name: {key: values[chosen] for key, values in arrays.items()} for name, chosen in rows.items()}


def keep_share(share: float) -> Callable[[Mapping[str, Any]], np.ndarray]:
    """Keep the labels of the first recordings of each action by each subject; below a quarter, by every other one."""

    def choose(columns: Mapping[str, Any]) -> np.ndarray:
        first = columns["trial"] <= max(1, round(4 * share))
        if share >= 0.25:
            return first
        place = np.unique(columns["subject"], return_inverse=True)[1]
        return first & ((place + columns["action"]) % round(0.25 / share) == 0)

    return choose


def keep_known_actions(columns: Mapping[str, Any]) -> np.ndarray:
    """Keep the labels of every other action."""
    return columns["action"] % 2 == 1


def score_actions(trainer: DistillationTrainer, splits: Splits) -> dict[str, float]:
    """Accuracy, and R@1 in the gallery of the training rows, of which no subject is evaluated."""
    queries, gallery = (trainer.embed(splits[name]) for name in ("evaluated", "train"))
    return evaluate(trainer, splits["evaluated"]) | {"R@1": recall_at_1(*queries, *gallery)}


def score_unknown_actions(trainer: DistillationTrainer, splits: Splits) -> dict[str, float]:
    """R@1 of the actions without a label in training, among their training rows, and accuracy of the rest."""
    parts = []
    for name in ("evaluated", "train"):
        rows = take(splits[name], ~keep_known_actions(splits[name]))
        parts += [embed_rows(trainer, rows, "action"), torch.as_tensor(rows["action"].astype(np.int64))]
    rows = take(splits["evaluated"], keep_known_actions(splits["evaluated"]))
    return evaluate(trainer, rows) | {"R@1": recall_at_1(*parts)}


def evaluate(trainer: DistillationTrainer, columns: Mapping[str, Any]) -> dict[str, float]:
    """Accuracy of the student, and of the teacher if there is one."""
    names = {"eval_student_accuracy": "accuracy", "eval_teacher_accuracy": "teacher"}
    found = trainer.evaluate(columns)
    return {shown: found[name] for name, shown in names.items() if name in found}


def take(columns: Mapping[str, Any], chosen: np.ndarray) -> dict[str, Any]:
    """The chosen rows."""
    return {name: values[chosen] for name, values in columns.items()}


# ---- Flickr8k ----


def read_scenes(folder: Path, split: str, seed: int) -> Splits:
    """Features of the photographs and of their captions, and the kind of scene that the captions tell."""
    return {name: dict(columns) for name, columns in _read_scenes(folder, split).items()}


@functools.cache
def _read_scenes(folder: Path, split: str) -> Splits:
    parts = {"train": "train", "evaluated": split}
    texts = {
        name: [" ".join(captions) for captions in pq.read_table(folder / f"{part}.parquet")["captions"].to_pylist()]
        for name, part in parts.items()
    }
    vectorizer = TfidfVectorizer(stop_words="english", min_df=5, sublinear_tf=True)
    words = {"train": vectorizer.fit_transform(texts["train"]), "evaluated": vectorizer.transform(texts["evaluated"])}
    topics = TruncatedSVD(min(100, words["train"].shape[1] - 1), random_state=0).fit(words["train"])
    points = {name: topics.transform(values) for name, values in words.items()}
    points = {
        name: values / np.linalg.norm(values, axis=1, keepdims=True).clip(1e-9) for name, values in points.items()
    }
    kinds = KMeans(SCENES, n_init=4, random_state=0).fit(points["train"])
    splits = {}
    with np.load(folder / "mobilenet_v1_features.npz") as images, np.load(folder / CAPTIONS) as captions:
        for name, part in parts.items():
            splits[name] = {
                "image": images[part].astype(np.float32)[:, None],
                "captions": captions[part].astype(np.float32).reshape(len(images[part]), -1, captions[part].shape[-1]),
                "scene": kinds.predict(points[name]),
            }
    splits["evaluated"]["alike"] = (words["evaluated"] @ words["evaluated"].T).toarray() > ALIKE
    return splits


def keep_rows(count: int) -> Callable[[Mapping[str, Any]], np.ndarray]:
    """Keep the labels of some rows, always the same."""

    def choose(columns: Mapping[str, Any]) -> np.ndarray:
        kept = np.zeros(len(columns["scene"]), bool)
        kept[np.random.default_rng(0).permutation(len(kept))[:count]] = True
        return kept

    return choose


def score_scenes(trainer: DistillationTrainer, splits: Splits) -> dict[str, float]:
    """Mean average precision and R@1 of photographs that are alike, and accuracy of the kind of scene."""
    rows = splits["evaluated"]
    return evaluate(trainer, rows) | rank_alike(embed_rows(trainer, rows, "scene"), rows["alike"])


def score_photographs(splits: Splits) -> dict[str, float]:
    """Figures of the features of the photographs themselves, less their mean."""
    features = torch.from_numpy(splits["evaluated"]["image"][:, 0] - splits["train"]["image"][:, 0].mean(0))
    return rank_alike(torch.nn.functional.normalize(features, dim=-1), splits["evaluated"]["alike"])


def rank_alike(embeds: torch.Tensor, alike: np.ndarray) -> dict[str, float]:
    """Rank all other rows by cosine for each row that any other is like; embeddings `(n, D)` of unit length."""
    alike = alike & ~np.eye(len(alike), dtype=bool)
    asked = alike.any(1)
    order = (embeds @ embeds.T).fill_diagonal_(-torch.inf).argsort(1, descending=True).numpy()
    found = np.take_along_axis(alike, order, 1)[asked]
    precision = found.cumsum(1) / np.arange(1, found.shape[1] + 1)
    return {"mAP": float(((precision * found).sum(1) / found.sum(1)).mean()), "R@1": float(found[:, 0].mean())}


def embed_rows(trainer: DistillationTrainer, columns: Mapping[str, Any], label: str) -> torch.Tensor:
    """Embed rows of any class, those without one in training too, at unit length."""
    known = dict(columns) | {label: np.full(len(columns[label]), trainer.labels[0])}
    return torch.nn.functional.normalize(trainer.embed(known)[0].float(), dim=-1)


# ---- all of them ----

_UTD = ("student.config.downsample=1", "student.config.shift=1", "training.max_steps=1000")
_TOWER = {"model_type": "sequence_encoder", "hidden_size": 128, "num_layers": 1, "kernel_size": 1}
_SCENES = {
    "name": "flickr-scenes",
    "student": {"column": "image", "config": _TOWER | {"num_channels": 1024, "dropout": 0.2, "noise": 0.1}},
    "auxiliaries": {"captions": {"config": _TOWER | {"num_channels": 384, "dropout": 0.2, "noise": 0.1}}},
    "data": {"source": "npz", "path": "arrays", "label_column": "scene", "group_column": "none", "train_groups": [0]},
    "training": {
        "num_train_epochs": 30,
        "per_device_train_batch_size": 256,
        "learning_rate": 2e-3,
        "weight_decay": 0.05,
        "warmup_steps": 0.1,
        "lr_scheduler_type": "cosine",
        "dataloader_drop_last": True,
        "logging_strategy": "epoch",
        "save_strategy": "no",
    },
}

SETTINGS = {
    "utd": Setting("amid-utd-mhad", _UTD, read_utd, keep_share(1), score_actions, "accuracy"),
    "utd-half": Setting("amid-utd-mhad", _UTD, read_utd, keep_share(1 / 2), score_actions, "accuracy"),
    "utd-quarter": Setting("amid-utd-mhad", _UTD, read_utd, keep_share(1 / 4), score_actions, "accuracy"),
    "utd-eighth": Setting("amid-utd-mhad", _UTD, read_utd, keep_share(1 / 8), score_actions, "accuracy"),
    "utd-unknown": Setting("amid-utd-mhad", _UTD, read_utd, keep_known_actions, score_unknown_actions, "R@1"),
    "scenes-300": Setting(_SCENES, (), read_scenes, keep_rows(300), score_scenes, "mAP", score_photographs),
    "scenes-1500": Setting(_SCENES, (), read_scenes, keep_rows(1500), score_scenes, "mAP", score_photographs),
}
