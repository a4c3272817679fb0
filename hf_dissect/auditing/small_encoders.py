"""Small encoders of images and captions, trained from scratch within minutes on a CPU to judge pairs."""

import torch
from torch import nn
from torch.nn.functional import normalize

PICTURE_SIZE = 48
"""Width and height of the pictures that `PictureEncoder` reads."""


class FeatureEncoder(nn.Module):
    """Linear encoder of image features, which it standardises.

    Args:
        features: Features of the images to train on, float `(m, D)`, for their mean and spread.
        width: Dimension of the embeddings.
        dropout: Share of the features set to zero in training.
    """

    mean: torch.Tensor
    spread: torch.Tensor

    def __init__(self, features: torch.Tensor, width: int, dropout: float) -> None:
        super().__init__()
        features = features.float()
        self.register_buffer("mean", features.mean(0))
        self.register_buffer("spread", features.std(0) + 1e-3 * features.std() + 1e-12)
        self.project = nn.Sequential(nn.Dropout(dropout), nn.Linear(features.shape[1], width))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return embeddings of unit length, float32 `(B, width)`."""
        standardised = (features.float() - self.mean) / self.spread
        return normalize(self.project(standardised * (4 / features.shape[1] ** 0.5)), dim=1)


class PictureEncoder(nn.Module):
    """Convolutional encoder of small pictures, uint8 `(B, 3, PICTURE_SIZE, PICTURE_SIZE)`.

    Args:
        width: Dimension of the embeddings.
        dropout: Share of the last features set to zero in training.
    """

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        channels = (3, 32, 64, 128, 128)
        layers: list[nn.Module] = []
        for before, after in zip(channels, channels[1:], strict=False):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.GELU()]
        last = channels[-1] * (PICTURE_SIZE // 16) ** 2
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(dropout), nn.Linear(last, width))

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """Return embeddings of unit length, float32 `(B, width)`."""
        return normalize(self.layers(pictures.float() / 127.5 - 1), dim=1)


class CaptionEncoder(nn.Module):
    """Encoder of a caption by the weighted mean of its tokens' embeddings; order counts for nothing.

    Args:
        vocabulary: Number of tokens.
        width: Dimension of the embeddings.
        dropout: Share of the mean's coordinates set to zero in training.
        padding: Token that fills short captions.
        word_dropout: Share of the tokens that a caption loses in training.
    """

    def __init__(
        self, vocabulary: int, width: int, dropout: float, *, padding: int, word_dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.importance = nn.Embedding(vocabulary, 1)
        nn.init.normal_(self.tokens.weight, std=0.1)
        nn.init.zeros_(self.importance.weight)
        self.project = nn.Sequential(nn.LayerNorm(width), nn.Dropout(dropout), nn.Linear(width, width))
        self.padding = padding
        self.word_dropout = word_dropout

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return embeddings of unit length, float32 `(B, width)`, of token ids `(B, L)`."""
        present = ids != self.padding
        if self.training:
            present = present & (torch.rand(ids.shape, device=ids.device) > self.word_dropout)
        weight = self.importance(ids).squeeze(-1).exp() * present
        mean = torch.einsum("bl,bld->bd", weight, self.tokens(ids)) / weight.sum(1, keepdim=True).clamp_min(1e-3)
        return normalize(self.project(mean), dim=1)
