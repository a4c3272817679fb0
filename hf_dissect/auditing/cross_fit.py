"""Cross-fitting: small dual encoders, each trained on one part of the pairs, score the other part."""

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from tqdm.auto import tqdm

from hf_dissect.auditing.folds import assign_folds, find_training_pairs
from hf_dissect.auditing.scores import MatchScores, score_matches
from hf_dissect.auditing.small_encoders import CaptionEncoder, FeatureEncoder, PictureEncoder
from hf_dissect.losses.logit_rows import find_false_negatives

FEWEST_TO_FIT = 200
_LARGEST_SCALE = 100.0  # as in CLIP
_AT_ONCE = 4096
_POWER = 1.5
_SHARE_RANGE = (0.05, 0.999)


@dataclass(frozen=True)
class PairInputs:
    """Inputs of `n` readable pairs of `m` distinct images.

    Attributes:
        images: Features of the images, float `(m, D)`, or pictures, uint8 `(m, 3, H, W)`.
        image_of_pair: Position of each pair's image in `images`, int64 `(n,)`.
        token_ids: Tokens of the captions, int64 `(n, L)`.
        padding: Token that fills short captions.
        vocabulary: Number of tokens.
        image_key: Keys of the images, int64 `(n,)`, equal where pairs share an image.
        caption_key: Keys of the captions, likewise.
    """

    images: torch.Tensor
    image_of_pair: torch.Tensor
    token_ids: torch.Tensor
    padding: int
    vocabulary: int
    image_key: torch.Tensor
    caption_key: torch.Tensor

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.image_of_pair)


@dataclass(frozen=True)
class FitSettings:
    """Settings of the small dual encoders.

    Attributes:
        models: Number of models a fold, whose scores are averaged.
        epochs: Number of passes over the training pairs.
        max_steps: Number of steps of a model at most.
        batch_size: Number of pairs a step at most; a quarter of the training pairs where these are few.
        learning_rate, weight_decay: Settings of AdamW.
        width: Dimension of the embeddings.
        dropout: Share of features set to zero in training.
    """

    models: int = 2
    epochs: int = 20
    max_steps: int = 6000
    batch_size: int = 512
    learning_rate: float = 2e-3
    weight_decay: float = 1.0
    width: int = 256
    dropout: float = 0.6


@dataclass(frozen=True)
class CrossFit:
    """Scores of `n` pairs by models that met neither their images nor their captions.

    Attributes:
        matches: Scores of the pairs, and of strangers within the folds.
        correlation: Mean of `max(100 cos(image, caption), 0)` over the models, float32 `(n,)`.
        fold: Folds of the pairs, int64 `(n,)`.
    """

    matches: MatchScores
    correlation: torch.Tensor
    fold: torch.Tensor


def cross_fit(
    inputs: PairInputs,
    *,
    folds: int = 2,
    seed: int = 0,
    settings: FitSettings | None = None,
    device: torch.device | None = None,
    progress: bool = False,
) -> CrossFit:
    """Score pairs by small dual encoders trained on other pairs.

    Args:
        inputs: Pairs.
        folds: Number of parts, at least 2; each is scored by models that trained on the others.
        seed: Seed of folds, weights and batches; the same seed gives the same scores on the same machine.
        settings: Settings of the encoders.
        device: Device to train on; None for the CPU.
        progress: Show a progress bar.

    Raises:
        ValueError: There are fewer than `FEWEST_TO_FIT` pairs, or they cannot be divided (see `assign_folds`).
    """
    settings = settings or FitSettings()
    if folds < 2:
        raise ValueError(f"folds={folds}: at least 2 are needed, so that no pair is judged by a model that learnt it.")
    if len(inputs) < FEWEST_TO_FIT:
        raise ValueError(
            f"{len(inputs)} readable pairs are too few to fit encoders; give at least {FEWEST_TO_FIT}, or audit with "
            "a trained model: hf-dissect audit MODEL --data DATA"
        )
    fold = assign_folds(inputs.image_key, inputs.caption_key, folds, seed)
    training = [find_training_pairs(fold, number, inputs.caption_key) for number in range(folds)]
    device = device or torch.device("cpu")
    score, correlation = torch.zeros(len(inputs)), torch.zeros(len(inputs))
    chance = []
    steps = [_count_steps(len(pairs), settings) for pairs in training]
    with tqdm(total=settings.models * sum(steps), desc="fitting encoders", unit="step", disable=not progress) as bar:
        for number, pairs in enumerate(training):
            (scored,) = torch.nonzero(fold == number, as_tuple=True)
            of_strangers = []
            for member in range(settings.models):
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(1000 * seed + 100 * number + member)
                    model = _train(inputs, pairs, settings, steps[number], device, bar)
                image, text = model.embed(inputs, scored, device)
                matches = score_matches(
                    image,
                    text,
                    logit_scale=model.scale,
                    image_key=inputs.image_key[scored],
                    caption_key=inputs.caption_key[scored],
                    seed=seed,
                )
                score[scored] += matches.score / settings.models
                correlation[scored] += ((image * text).sum(1) * 100).clamp_min(0) / settings.models
                of_strangers.append(matches.chance)
            chance.append(torch.stack(of_strangers).mean(0))
    return CrossFit(MatchScores(score, torch.cat(chance)), correlation, fold)


class _DualEncoder(nn.Module):
    """Encoder of images, encoder of captions, and the scale of their cosines."""

    def __init__(self, inputs: PairInputs, pairs: torch.Tensor, settings: FitSettings) -> None:
        super().__init__()
        width, dropout = settings.width, settings.dropout
        if inputs.images.dim() == 2:
            images = inputs.images[inputs.image_of_pair[pairs].unique()]
            self.image: nn.Module = FeatureEncoder(images, width, dropout)
        else:
            self.image = PictureEncoder(width, dropout)
        self.text = CaptionEncoder(inputs.vocabulary, width, dropout, padding=inputs.padding)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @property
    def scale(self) -> float:
        """Factor that turns cosines into logits."""
        return self.log_scale.exp().clamp_max(_LARGEST_SCALE).item()

    @torch.no_grad()
    def embed(
        self, inputs: PairInputs, pairs: torch.Tensor, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return embeddings of images and captions of pairs, float32 `(len(pairs), width)`, on the CPU."""
        self.eval()
        distinct, place = inputs.image_of_pair[pairs].unique(return_inverse=True)
        image = torch.cat([self.image(inputs.images[part].to(device)).cpu() for part in distinct.split(_AT_ONCE)])
        text = [self.text(inputs.token_ids[part].to(device)).cpu() for part in pairs.split(_AT_ONCE)]
        return image[place], torch.cat(text)


def _count_steps(pairs: int, settings: FitSettings) -> int:
    return min(settings.max_steps, settings.epochs * (pairs // _choose_batch_size(pairs, settings)))


def _choose_batch_size(pairs: int, settings: FitSettings) -> int:
    return max(2, min(settings.batch_size, pairs // 4))


def _train(
    inputs: PairInputs, pairs: torch.Tensor, settings: FitSettings, steps: int, device: torch.device, bar: tqdm
) -> _DualEncoder:
    """Train a dual encoder by the noisy-channel rule; return the mean of its weights after the first quarter."""
    model = _DualEncoder(inputs, pairs, settings).to(device).train()
    decayed = [weight for name, weight in model.named_parameters() if name != "log_scale"]
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": [model.log_scale], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, fused=True)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (0.05 * steps)))
    mean = torch.optim.swa_utils.AveragedModel(model)
    channel = _NoisyChannel()
    size, step = _choose_batch_size(len(pairs), settings), 0
    while step < steps:
        order = pairs[torch.randperm(len(pairs))]
        for batch in order[: len(order) - len(order) % size].split(size):
            image = model.image(inputs.images[inputs.image_of_pair[batch]].to(device))
            text = model.text(inputs.token_ids[batch].to(device))
            logits = image @ text.T * model.log_scale.exp().clamp_max(_LARGEST_SCALE)
            logits = logits.masked_fill(_find_related(inputs, batch).to(device), -torch.inf)
            loss = channel(-(logits.log_softmax(1).diagonal() + logits.log_softmax(0).diagonal()) / 2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            warmup.step()
            step += 1
            bar.update()
            if step >= steps / 4:
                mean.update_parameters(model)
            if step == steps:
                break
    return cast(_DualEncoder, mean.module)


def _find_related(inputs: PairInputs, batch: torch.Tensor) -> torch.Tensor:
    """Compare the pairs of a batch: True for another pair that shares image or caption, bool `(B, B)`."""
    keys = torch.stack([inputs.image_key[batch], inputs.caption_key[batch]])
    return find_false_negatives(keys, keys).fill_diagonal_(False)


class _NoisyChannel:
    """Loss under the assumption that a caption belongs to its image with a probability, and is any other otherwise.

    The weight of a pair is a power of its posterior probability to belong together,
    `sigmoid(logit(share) + log B - l)`, `l` its loss among `B` pairs; the share is a moving mean of posteriors.
    The likelihood has the power 1; a higher one is more careful with pairs that can be learnt by heart.
    """

    def __init__(self) -> None:
        self.share = 0.5

    def __call__(self, losses: torch.Tensor) -> torch.Tensor:
        """Return the weighted mean of the losses `(B,)` of a batch."""
        evidence = math.log(len(losses)) - losses.detach()
        posterior = torch.sigmoid(math.log(self.share / (1 - self.share)) + evidence)
        self.share = min(max(0.98 * self.share + 0.02 * posterior.mean().item(), _SHARE_RANGE[0]), _SHARE_RANGE[1])
        return (posterior**_POWER * losses).mean()
