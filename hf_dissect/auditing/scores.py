"""Scores of how much better an image and its caption match each other than the rest of the data set."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from tqdm.auto import tqdm

from hf_dissect.evaluation.embeddings import as_embeddings

NUM_REFERENCES = 4096
FEWEST_PAIRS = 10
_RECOMBINATIONS = 16


@dataclass(frozen=True)
class MatchScores:
    """Scores of `n` pairs, and of strangers, which are images with captions of other pairs.

    Attributes:
        score: Scores of the pairs, float32 `(n,)`, in nats; a low one is suspicious.
        chance: Scores of strangers drawn at random, float32 `(m,)`.
    """

    score: torch.Tensor
    chance: torch.Tensor


@torch.no_grad()
def score_matches(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    *,
    logit_scale: float,
    image_key: torch.Tensor | None = None,
    caption_key: torch.Tensor | None = None,
    num_references: int = NUM_REFERENCES,
    seed: int = 0,
    block_size: int = 1024,
    device: torch.device | None = None,
    progress: bool = False,
) -> MatchScores:
    """Score pairs against a random sample of the others.

    The cosine alone favours images and captions that resemble everything. The score is the logit of the pair minus,
    on average over both directions, the log of the mean exponentiated logit of its image with other captions, and of
    its caption with other images. For the contrastive loss this estimates the pointwise mutual information
    `log p(image, caption) / (p(image) p(caption))` (InfoNCE, arXiv 1807.03748, section 2.3): above 0
    the two occur together more often than by chance.

    Args:
        image_embeds: Embeddings of the images, float32 `(n, D)`, unit length.
        text_embeds: Embeddings of the captions, float32 `(n, D)`, unit length.
        logit_scale: Factor of the model that turns cosines into logits.
        image_key: Keys of the images, int64 `(n,)`, equal for pairs that share an image, which are not compared with
            each other; None where all differ.
        caption_key: Keys of the captions, int64 `(n,)`, likewise.
        num_references: Number of other pairs to compare with; memory and time a pair grow with it, not with `n`.
        seed: Seed for the choice of references.
        block_size: Number of pairs scored at a time.
        device: Device to score on; None for the device of the embeddings.
        progress: Show a progress bar.

    Raises:
        ValueError: There are fewer than 10 pairs, embeddings are not finite, or all pairs share one image or caption.
    """
    count = len(image_embeds)
    if count < FEWEST_PAIRS:
        raise ValueError(f"{count} readable pairs are too few to compare them with each other; give at least 10.")
    image_embeds, text_embeds = as_embeddings("image_embeds", image_embeds), as_embeddings("text_embeds", text_embeds)
    image_key = torch.arange(count) if image_key is None else image_key
    caption_key = torch.arange(count) if caption_key is None else caption_key
    generator = torch.Generator().manual_seed(seed)
    references = torch.randperm(count, generator=generator)[:num_references]
    keys = (image_key, caption_key)
    blocks = torch.arange(count).split(block_size)
    compare = partial(_typical_logit, keys=keys, references=references, logit_scale=logit_scale, device=device)
    with tqdm(total=2 * count, desc="comparing pairs", unit="pair", disable=not progress) as bar:
        of_image = compare(image_embeds, text_embeds, blocks=blocks, bar=bar)
        of_text = compare(text_embeds, image_embeds, blocks=blocks, bar=bar)
    logit = (image_embeds * text_embeds).sum(1) * logit_scale
    chance = []
    for shift in torch.randint(1, count, (_RECOMBINATIONS,), generator=generator).tolist():
        logit_of_strangers = (image_embeds * text_embeds.roll(shift, 0)).sum(1) * logit_scale
        related = (image_key == image_key.roll(shift)) | (caption_key == caption_key.roll(shift))
        chance.append((logit_of_strangers - (of_image + of_text.roll(shift)) / 2)[~related])
    return MatchScores(logit - (of_image + of_text) / 2, torch.cat(chance))


def _typical_logit(
    own: torch.Tensor,
    others: torch.Tensor,
    *,
    keys: tuple[torch.Tensor, torch.Tensor],
    references: torch.Tensor,
    logit_scale: float,
    blocks: Sequence[torch.Tensor],
    device: torch.device | None,
    bar: tqdm,
) -> torch.Tensor:
    """Return the log of the mean exponentiated logit of each of `own` with its references in `others`, `(n,)`."""
    compared = others[references].to(device).T
    typical = []
    for rows in blocks:
        logits = own[rows].to(device) @ compared * logit_scale
        related = torch.zeros_like(logits, dtype=torch.bool)
        for key in keys:
            related |= key[rows, None].to(device) == key[references].to(device)
        known = (~related).sum(1)
        typical.append((logits.masked_fill_(related, -torch.inf).logsumexp(1) - known.log()).to(own.device))
        bar.update(len(rows))
    values = torch.cat(typical)
    known = values.isfinite()
    if not known.any():
        raise ValueError("All pairs have the same image, or the same caption: there is nothing to compare them with.")
    return torch.where(known, values, values[known].median())  # a caption that all references share
