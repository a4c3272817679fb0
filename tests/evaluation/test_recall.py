"""Retrieval figures against ranks counted pair by pair."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_dissect.evaluation import count_repeats, retrieval_from_pairs, retrieval_metrics, retrieval_ranks


def counted_ranks(images: np.ndarray, texts: np.ndarray, owner: np.ndarray) -> tuple[list[int], list[int]]:
    """The protocol in loops: every wrong candidate at least as near as the right one goes before it."""
    cosine = [
        [i @ t / np.linalg.norm(i) / np.linalg.norm(t) for t in texts.astype(float)] for i in images.astype(float)
    ]
    image_ranks, text_ranks = [], []
    for i in range(len(images)):
        own = [cosine[i][j] for j in range(len(texts)) if owner[j] == i]
        if own:
            image_ranks.append(1 + sum(cosine[i][j] >= max(own) for j in range(len(texts)) if owner[j] != i))
    for j in range(len(texts)):
        right = cosine[owner[j]][j]
        text_ranks.append(1 + sum(cosine[i][j] >= right for i in range(len(images)) if i != owner[j]))
    return image_ranks, text_ranks


def correlated(num_images: int, num_texts: int, dim: int = 8) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random float32 embeddings of any length, captions near to their images, in no order."""
    rng = np.random.default_rng(num_images)
    owner = rng.permutation(np.arange(num_texts) % num_images)
    images = rng.normal(size=(num_images, dim))
    texts = images[owner] + rng.normal(size=(num_texts, dim))
    scale = rng.uniform(0.1, 30, size=(num_texts, 1))
    return images.astype(np.float32), (texts * scale).astype(np.float32), owner


@pytest.mark.parametrize("block_size", [1, 7, 16, 1000])
def test_ranks_equal_counted_ones_whatever_the_block(block_size: int) -> None:
    images, texts, owner = correlated(23, 61)
    image_ranks, text_ranks = retrieval_ranks(images, texts, owner, block_size=block_size)
    expected_image, expected_text = counted_ranks(images, texts, owner)
    assert image_ranks.tolist() == expected_image
    assert text_ranks.tolist() == expected_text
    assert 1 < np.mean(expected_image) < 20, "the example must be neither trivial nor hopeless"


def test_metrics_are_the_shares_and_medians_of_the_ranks() -> None:
    images, texts, owner = correlated(40, 100)
    image_ranks, text_ranks = map(np.array, counted_ranks(images, texts, owner))
    metrics = retrieval_metrics(torch.from_numpy(images), torch.from_numpy(texts), torch.from_numpy(owner))
    expected = {f"image_to_text_R@{k}": 100 * np.mean(image_ranks <= k) for k in (1, 5, 10)}
    expected |= {f"text_to_image_R@{k}": 100 * np.mean(text_ranks <= k) for k in (1, 5, 10)}
    expected["recall_sum"] = sum(expected.values())
    expected["image_to_text_median_rank"] = np.median(image_ranks)
    expected["text_to_image_median_rank"] = np.median(text_ranks)
    assert metrics == pytest.approx(expected)
    assert all(type(value) is float for value in metrics.values())


def test_one_caption_each_needs_no_owners_and_perfect_embeddings_reach_600() -> None:
    metrics = retrieval_metrics(np.eye(12), 5 * np.eye(12))
    assert metrics["recall_sum"] == pytest.approx(600)
    assert metrics["image_to_text_median_rank"] == metrics["text_to_image_median_rank"] == 1


def test_constant_embeddings_earn_nothing() -> None:
    # 3 captions an image, all cosines equal: the 3 x 19 foreign captions and the 19 foreign images all go before.
    row = np.random.default_rng(0).normal(size=(1, 50)).astype(np.float32)
    image_ranks, text_ranks = retrieval_ranks(
        row.repeat(20, 0), 3 * row.repeat(60, 0), np.arange(60) // 3, block_size=7
    )
    assert image_ranks.tolist() == [58] * 20
    assert text_ranks.tolist() == [20] * 60
    assert retrieval_metrics(row.repeat(20, 0), row.repeat(60, 0), np.arange(60) // 3)["recall_sum"] == 0


def test_zero_embeddings_earn_nothing() -> None:
    assert retrieval_metrics(np.zeros((20, 4)), np.eye(20, 4))["recall_sum"] == 0


def test_other_own_captions_are_no_rivals() -> None:
    images = np.eye(2)
    texts = np.array([[1.0, 0.0], [0.9, 0.1], [0.8, 0.2], [0.0, 1.0]])
    image_ranks, _ = retrieval_ranks(images, texts, [0, 0, 0, 1])
    assert image_ranks.tolist() == [1, 1]


def test_an_image_without_caption_is_a_distractor_for_captions_only() -> None:
    images = np.array([[1.0, 0.0], [0.0, 1.0], [0.9, 0.5]])
    texts = np.array([[0.9, 0.5], [0.0, 1.0]])
    image_ranks, text_ranks = retrieval_ranks(images, texts, [0, 1])
    assert image_ranks.tolist() == [1, 1]
    assert text_ranks.tolist() == [2, 1]


@pytest.mark.parametrize(
    "as_key", [lambda o: o * 7 - 50, lambda o: torch.tensor(o), lambda o: [f"{i}.jpg" for i in o]]
)
def test_pairs_keep_each_image_once(as_key) -> None:
    images, texts, owner = correlated(15, 40)
    assert retrieval_from_pairs(images[owner], texts, as_key(owner), block_size=9) == pytest.approx(
        retrieval_metrics(images, texts, owner)
    )


def test_gradients_and_half_precision_are_accepted() -> None:
    images = torch.eye(4, dtype=torch.bfloat16, requires_grad=True)
    assert retrieval_metrics(images, images)["recall_sum"] == pytest.approx(600)


def test_no_tensor_grows_with_the_number_of_similarities() -> None:
    class LargestOutput(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            output = func(*args, **(kwargs or {}))
            sizes = [leaf.numel() for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
            self.numel = max([self.numel, *sizes])
            return output

    num_images, num_texts, dim, block_size = 2000, 4000, 4, 64
    images, texts, owner = correlated(num_images, num_texts, dim)
    with LargestOutput() as largest:
        retrieval_metrics(images, texts, owner, block_size=block_size)
    assert block_size**2 <= largest.numel <= num_texts * dim < num_images * num_texts / 100


@pytest.mark.parametrize(
    ("images", "texts", "owner", "message"),
    [
        (np.eye(3), np.eye(4, 3), None, "3 image_embeds and 4 text_embeds.*image_of_text"),
        (np.eye(3), np.eye(3, 5), None, "3 dimensions and text_embeds has 5"),
        (np.full((3, 2), np.nan), np.eye(3, 2), None, "image_embeds holds NaN or infinite numbers in 3 of 3"),
        (np.eye(3), np.diag([1, 1, np.inf]), None, "text_embeds holds NaN or infinite numbers in 1 of 3.*row 2"),
        (np.eye(3), np.eye(3), [0, 1], r"image_of_text has shape \(2,\)"),
        (np.eye(3), np.eye(3), [0, 1, 3], r"image_of_text\[2\] is 3"),
        (np.eye(3), np.eye(3), [0, -1, 2], r"image_of_text\[1\] is -1"),
        (np.eye(3), np.eye(3), [0.0, 1.0, 2.0], "must hold integers"),
        (np.zeros((0, 3)), np.zeros((0, 3)), None, "at least one of each"),
        (np.zeros(3), np.eye(3), None, r"image_embeds has shape \(3,\)"),
        ([[1.0], [1.0, 2.0]], np.eye(2), None, "all rows have one length"),
    ],
)
def test_bad_input_is_named(images, texts, owner, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        retrieval_metrics(images, texts, owner)


@pytest.mark.parametrize("block_size", [0, -1, 2.5, True])
def test_a_block_has_at_least_one_row(block_size) -> None:
    with pytest.raises(ValueError, match="block_size is"):
        retrieval_metrics(np.eye(2), np.eye(2), block_size=block_size)


def test_pairs_of_unequal_length_are_named() -> None:
    with pytest.raises(ValueError, match=r"3 image_embeds, 3 text_embeds and image_key of shape \(2,\)"):
        retrieval_from_pairs(np.eye(3), np.eye(3), [1, 2])


def counted_ranks_of_pairs(images, texts, image_key, text_key) -> tuple[list[int], list[int]]:
    """The protocol in loops over pairs: an image and a caption belong together if any pair has both."""
    together = set(zip(image_key, text_key, strict=True))
    cosine = images.astype(float) @ texts.astype(float).T
    cosine /= np.linalg.norm(images, axis=1)[:, None] * np.linalg.norm(texts, axis=1)
    pairs, first_pairs = range(len(image_key)), [image_key.index(key) for key in sorted(set(image_key))]
    image_ranks, text_ranks = [], []
    for i in first_pairs:
        right = [(image_key[i], text_key[j]) in together for j in pairs]
        best = max(cosine[i][j] for j in pairs if right[j])
        image_ranks.append(1 + sum(cosine[i][j] >= best - 1e-9 for j in pairs if not right[j]))
    for j in pairs:
        right = [(image_key[i], text_key[j]) in together for i in first_pairs]
        best = max(cosine[i][j] for i, is_right in zip(first_pairs, right, strict=True) if is_right)
        wrong = (i for i, is_right in zip(first_pairs, right, strict=True) if not is_right)
        text_ranks.append(1 + sum(cosine[i][j] >= best - 1e-9 for i in wrong))
    return image_ranks, text_ranks


def repeated_pairs(num_images: int, num_texts: int, num_pairs: int) -> tuple:
    """Pairs of random images and captions that both occur several times, in no order, with their keys."""
    rng = np.random.default_rng(num_pairs)
    image_key, text_key = rng.integers(0, num_images, num_pairs), rng.integers(0, num_texts, num_pairs)
    directions = rng.normal(size=(num_texts, 6))
    images = np.array([directions[text_key[image_key == i]].sum(0) for i in range(num_images)])
    images += rng.normal(size=images.shape)
    texts = directions + rng.normal(size=directions.shape) / 2
    return images[image_key].astype(np.float32), texts[text_key].astype(np.float32), image_key, text_key


@pytest.mark.parametrize("block_size", [1, 5, 1000])
@pytest.mark.parametrize("sizes", [(30, 12, 40), (9, 25, 60), (20, 4, 50), (40, 60, 90)])
def test_a_caption_of_several_images_is_right_for_each_of_them(block_size, sizes) -> None:
    images, texts, image_key, text_key = repeated_pairs(*sizes)
    expected_image, expected_text = counted_ranks_of_pairs(images, texts, image_key.tolist(), text_key.tolist())
    metrics = retrieval_from_pairs(
        images, texts, image_key, [f"{key} dogs" for key in text_key], block_size=block_size
    )
    for direction, ranks in (("image_to_text", expected_image), ("text_to_image", expected_text)):
        for k in (1, 5, 10):
            assert metrics[f"{direction}_R@{k}"] == pytest.approx(100 * np.mean(np.array(ranks) <= k))
        assert metrics[f"{direction}_median_rank"] == np.median(ranks)
    assert metrics["image_to_text_R@1"] < 100
    assert metrics["recall_sum"] > retrieval_from_pairs(images, texts, image_key)["recall_sum"]


def test_keys_of_distinct_captions_change_no_figure() -> None:
    images, texts, owner = correlated(40, 200)
    metrics = retrieval_metrics(images, texts, owner, np.random.default_rng(0).permutation(200))
    assert metrics == retrieval_metrics(images, texts, owner)


def test_one_caption_for_all_images_is_right_for_all_and_its_own_ceiling_is_a_share() -> None:
    images = np.random.default_rng(0).normal(size=(125, 8))
    metrics = retrieval_from_pairs(images, images[:1].repeat(125, 0), np.arange(125), ["a photo"] * 125)
    assert metrics["recall_sum"] == 600 and metrics["repeated_captions"] == 125
    for direction in ("image_to_text", "text_to_image"):
        assert [metrics[f"{direction}_own_ceiling@{k}"] for k in (1, 5, 10)] == pytest.approx([0.8, 4, 8])


def test_equal_captions_whose_embeddings_differ_by_a_rounding_error_do_not_compete() -> None:
    images = np.eye(3)
    texts = np.array([[1, 0.1, 0], [1, 0.1 + 1e-6, 0], [0, 0, 1.0]])
    image_ranks, text_ranks = retrieval_ranks(images, texts, text_key=[7, 7, 9])
    assert image_ranks.tolist() == text_ranks.tolist() == [1, 1, 1]


def test_constant_embeddings_earn_no_more_than_their_right_answers_of_other_pairs() -> None:
    row = np.random.default_rng(0).normal(size=(1, 50)).astype(np.float32)
    image_ranks, text_ranks = retrieval_ranks(row.repeat(20, 0), row.repeat(20, 0), text_key=np.arange(20) // 2)
    assert image_ranks.tolist() == text_ranks.tolist() == [19] * 20


def test_the_ceiling_of_own_captions_is_that_of_the_best_order() -> None:
    # Image 0 has "x" twice and "y", image 1 "x", image 2 "y" and "z", image 3 "w".
    owner, keys = [0, 0, 0, 1, 2, 2, 3], ["x", "x", "y", "x", "y", "z", "w"]
    figures = count_repeats(owner, keys)
    assert figures["repeated_captions"] == 5
    assert count_repeats([5, 7, 7], ["x", "y", "y"]) == {"repeated_captions": 0}
    # An image shows its rarest caption first, in a random order of its copies; a caption shows the image with most.
    assert figures["image_to_text_own_ceiling@1"] == pytest.approx(100 * (2 / 3 + 1 / 3 + 1 + 1) / 4)
    assert figures["text_to_image_own_ceiling@1"] == pytest.approx(100 * (2 + 1 + 1 + 1) / 7)
    assert figures["image_to_text_own_ceiling@5"] == figures["text_to_image_own_ceiling@5"] == 100


def test_keys_of_another_length_are_named() -> None:
    with pytest.raises(ValueError, match=r"text_key has shape \(2,\), but must be \(3,\): one key per caption"):
        retrieval_from_pairs(np.eye(3), np.eye(3), [1, 2, 3], ["a", "b"])
