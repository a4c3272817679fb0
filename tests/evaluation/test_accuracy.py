"""Zero-shot accuracies against a count in loops."""

import numpy as np
import pytest
import torch

from hf_dissect.evaluation import zero_shot_metrics


@pytest.mark.parametrize("block_size", [1, 13, 1024])
def test_accuracies_equal_counted_ones(block_size: int) -> None:
    rng = np.random.default_rng(3)
    classes = rng.normal(size=(9, 6))
    labels = rng.integers(0, 7, size=80)  # Classes 7 and 8 do not occur and must not enter the mean over classes.
    images = classes[labels] * rng.uniform(0.1, 2, size=(80, 1)) + 2 * rng.normal(size=(80, 6))
    hits = {1: [], 5: []}
    for image, label in zip(images, labels, strict=True):
        cosine = [image @ row / np.linalg.norm(image) / np.linalg.norm(row) for row in classes]
        order = sorted(range(9), key=lambda c: -cosine[c])
        for k in hits:
            hits[k].append(label in order[:k])
    of_class = [np.mean([hit for hit, label in zip(hits[1], labels, strict=True) if label == c]) for c in range(7)]

    metrics = zero_shot_metrics(images, torch.from_numpy(classes), labels, block_size=block_size)
    expected = {
        "accuracy@1": np.mean(hits[1]),
        "accuracy@5": np.mean(hits[5]),
        "mean_per_class_accuracy": np.mean(of_class),
    }
    assert metrics == pytest.approx(expected)
    assert 0.2 < metrics["accuracy@1"] < metrics["accuracy@5"] < 1


def test_a_k_above_the_number_of_classes_is_left_out() -> None:
    assert set(zero_shot_metrics(np.eye(4), np.eye(4), [0, 1, 2, 3])) == {"accuracy@1", "mean_per_class_accuracy"}
    assert zero_shot_metrics(np.eye(5), np.eye(5), range(5))["accuracy@5"] == 1


def test_equal_classes_earn_nothing() -> None:
    metrics = zero_shot_metrics(np.eye(6), np.ones((6, 6)), np.arange(6))
    assert metrics == {"accuracy@1": 0, "accuracy@5": 0, "mean_per_class_accuracy": 0}


@pytest.mark.parametrize(
    ("labels", "top_k", "message"),
    [
        ([0, 1], (1,), r"labels has shape \(2,\)"),
        ([0, 1, 3], (1,), r"labels\[2\] is 3, but there are 3 classes"),
        ([0, -1, 2], (1,), r"labels\[1\] is -1"),
        ([0.0, 1.0, 2.0], (1,), "must hold integers"),
        ([0, 1, 2], (0,), "top_k is 0"),
    ],
)
def test_bad_input_is_named(labels, top_k, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        zero_shot_metrics(np.eye(3), np.eye(3), labels, top_k)
