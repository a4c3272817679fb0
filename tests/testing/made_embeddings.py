"""Embeddings of images and captions of which some are mismatched."""

import torch
from torch.nn.functional import normalize


def make_embeddings_of_pairs(count: int, rate: float, *, hubs: float = 0.0, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Return images `(count, 32)`, texts near theirs, and which belong together; `hubs` adds what all share."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(count, 32, generator=generator)
    text = image + 0.8 * torch.randn(count, 32, generator=generator)
    wrong = torch.randperm(count, generator=generator)[: round(rate * count)]
    text[wrong] = text[wrong.roll(1)]
    is_clean = torch.ones(count, dtype=torch.bool)
    is_clean[wrong] = False
    common = torch.ones(32)
    image += hubs * torch.rand(count, 1, generator=generator) * common
    text += hubs * torch.rand(count, 1, generator=generator) * common
    return normalize(image, dim=1), normalize(text, dim=1), is_clean
