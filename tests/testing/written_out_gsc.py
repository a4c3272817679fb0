"""The formulas of GSC as the paper has them, with every structure in full, in NumPy."""

import numpy as np


def structures(embeds: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """`A_ij = (e_i . e_j) y_j`."""
    return np.array([[a @ b * y for b, y in zip(embeds, mask, strict=True)] for a in embeds])


def true_pair_probability(logits: np.ndarray) -> np.ndarray:
    """Softmax over each row, at the diagonal."""
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    return np.diag(shifted) / shifted.sum(1)


def loss(images: np.ndarray, texts: np.ndarray, labels: np.ndarray, gamma: float, temperature: float) -> float:
    similarity = images @ texts.T / temperature
    cross_modal = -(np.log(true_pair_probability(similarity)) + np.log(true_pair_probability(similarity.T))) / 2
    geometry = structures(images, labels) @ structures(texts, labels).T
    intra_modal = -np.log(true_pair_probability(geometry))
    return float((labels * cross_modal).mean() + gamma * (labels * intra_modal).mean())


def evidence(images: np.ndarray, texts: np.ndarray, mask: np.ndarray, temperature: float) -> dict[str, np.ndarray]:
    similarity = images @ texts.T / temperature
    agreement = (true_pair_probability(similarity) + true_pair_probability(similarity.T)) / 2
    of_images, of_texts = structures(images, mask), structures(texts, mask)
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(of_images, of_texts, strict=True)]
    return {"agreement": agreement, "structure": np.array(cosines)}


def gradients(images: np.ndarray, texts: np.ndarray, *arguments) -> list[np.ndarray]:
    """Of the loss by both sides' embeddings, by central differences."""
    both, step = [images.copy(), texts.copy()], 1e-6
    found = [np.empty_like(images), np.empty_like(texts)]
    for side, gradient in zip(both, found, strict=True):
        for place in np.ndindex(side.shape):
            value, ends = side[place], []
            for moved in (value + step, value - step):
                side[place] = moved
                ends.append(loss(*both, *arguments))
            side[place] = value
            gradient[place] = (ends[0] - ends[1]) / (2 * step)
    return found


def pairs(size: int, dim: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images and texts `(size, dim)` of unit length that belong together more or less, and labels in [0, 1]."""
    random = np.random.default_rng(seed)
    images = random.normal(size=(size, dim))
    texts = images + random.uniform(0.2, 2, (size, 1)) * random.normal(size=(size, dim))
    return *(side / np.linalg.norm(side, axis=1, keepdims=True) for side in (images, texts)), random.random(size)
