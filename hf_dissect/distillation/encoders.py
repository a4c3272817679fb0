"""Small encoders of sequences and of sequences of frames, as ordinary transformers models."""

from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling


class SequenceEncoderConfig(PreTrainedConfig):
    """Settings of `SequenceEncoder`.

    Args:
        num_channels: Numbers per time step, such as 6 of an inertial sensor or 3 * 20 of a skeleton's joints.
        hidden_size: Size of the features.
        num_layers: Number of convolutions, each of stride 2 over time.
        kernel_size: Time steps in the window of a convolution; odd.
        dropout: Share of the pooled features set to zero in training, in [0, 1).
        input_mean: Mean of each channel, subtracted from the inputs (see `standardisation`); None for no subtraction.
        input_std: Standard deviation of each channel, by which the inputs are divided; None for no division.
        noise: Standard deviation of the noise added to the standardised inputs in training.

    Raises:
        ValueError: A value is impossible.
    """

    model_type = "sequence_encoder"

    num_channels: int = 6
    hidden_size: int = 64
    num_layers: int = 3
    kernel_size: int = 5
    dropout: float | int = 0.0
    input_mean: list[float] | None = None
    input_std: list[float] | None = None
    noise: float | int = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        _check_settings(self, ("num_channels", "hidden_size", "num_layers", "kernel_size"))
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {self.kernel_size}")
        super().__post_init__(**kwargs)


class FrameSequenceEncoderConfig(PreTrainedConfig):
    """Settings of `FrameSequenceEncoder`.

    Args:
        num_channels: Channels of a frame; 1 for depth.
        hidden_size: Size of the features.
        channels: Output channels of the convolutions on each frame, all of stride 2; None for [16, 32, 32].
        downsample: Side in pixels of the squares over which frames are averaged first.
        grid: Rows and columns to which a frame is pooled, so that the place of a movement is kept; None for [3, 4].
        motion: True to add the difference from the previous frame as further channels.
        dropout: Share of the pooled features set to zero in training, in [0, 1).
        input_mean: Mean of each channel, subtracted from the inputs (see `standardisation`); None for no subtraction.
        input_std: Standard deviation of each channel, by which the inputs are divided; None for no division.
        noise: Standard deviation of the noise added to the standardised inputs in training.
        shift: Largest shift of a clip in training, in pixels, the same for all of its frames.

    Raises:
        ValueError: A value is impossible.
    """

    model_type = "frame_sequence_encoder"

    num_channels: int = 1
    hidden_size: int = 64
    channels: list[int] | None = None
    downsample: int = 1
    grid: list[int] | None = None
    motion: bool = True
    dropout: float | int = 0.0
    input_mean: list[float] | None = None
    input_std: list[float] | None = None
    noise: float | int = 0.0
    shift: int = 0

    def __post_init__(self, **kwargs: Any) -> None:
        self.channels = [16, 32, 32] if self.channels is None else self.channels
        self.grid = [3, 4] if self.grid is None else self.grid
        _check_settings(self, ("num_channels", "hidden_size", "downsample"))
        if self.shift < 0:
            raise ValueError(f"shift must be at least 0, got {self.shift}")
        super().__post_init__(**kwargs)


class _SmallEncoder(PreTrainedModel):
    """Base of the encoders, with torch's own initial weights: those of transformers are meant for wide models."""

    def _init_weights(self, module: nn.Module) -> None:
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()


class SequenceEncoder(_SmallEncoder):
    """Encoder of sequences: convolutions over time, pooled by mean and maximum.

    Group normalisation keeps the features of a row independent of the other rows of its batch.

    Args:
        config: Settings of the encoder.
    """

    config: SequenceEncoderConfig
    config_class = SequenceEncoderConfig
    base_model_prefix = "sequence_encoder"
    main_input_name = "values"

    def __init__(self, config: SequenceEncoderConfig) -> None:
        super().__init__(config)
        self.standardise = _Standardise(config)
        layers, width = [], config.num_channels
        for _ in range(config.num_layers):
            layers.append(_make_layer(nn.Conv1d, width, config.hidden_size, config.kernel_size))
            width = config.hidden_size
        self.layers = nn.ModuleList(layers)
        self.pool = _Pool(config.hidden_size, config.hidden_size, config.dropout)
        self.post_init()

    def forward(self, values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Encode sequences.

        Args:
            values: Sequences `(B, T, ...)`; the dimensions after the time are flattened to `num_channels` numbers.
            **kwargs: Arguments of other encoders, which have no effect here.

        Returns:
            `last_hidden_state` `(B, T', hidden_size)` and `pooler_output` `(B, hidden_size)`.

        Raises:
            ValueError: The shape does not fit `num_channels`.
        """
        values = values.flatten(2) if values.ndim > 3 else values
        if values.ndim != 3 or values.shape[-1] != self.config.num_channels:
            raise ValueError(
                f"values must be of shape (B, T, ...) with {self.config.num_channels} numbers per time step, got "
                f"{tuple(values.shape)}; set num_channels to that of the data"
            )
        hidden = self.standardise(values, self.dtype).transpose(1, 2)
        for layer in self.layers:
            hidden = layer(hidden)
        hidden = hidden.transpose(1, 2)
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=self.pool(hidden))


class FrameSequenceEncoder(_SmallEncoder):
    """Encoder of clips: convolutions on each frame, pooled to a coarse grid, then a convolution over time.

    Args:
        config: Settings of the encoder.
    """

    config: FrameSequenceEncoderConfig
    config_class = FrameSequenceEncoderConfig
    base_model_prefix = "frame_sequence_encoder"
    main_input_name = "pixel_values"

    def __init__(self, config: FrameSequenceEncoderConfig) -> None:
        super().__init__(config)
        self.standardise = _Standardise(config)
        rows, columns = cast(list[int], config.grid)
        width, layers = config.num_channels * (2 if config.motion else 1), []
        for channels in cast(list[int], config.channels):
            layers.append(_make_layer(nn.Conv2d, width, channels, 3))
            width = channels
        self.layers = nn.Sequential(*layers)
        self.grid = nn.AdaptiveAvgPool2d((rows, columns))
        self.frame = nn.Linear(width * rows * columns, config.hidden_size)
        self.temporal = _make_layer(nn.Conv1d, config.hidden_size, config.hidden_size, 3, stride=1)
        self.pool = _Pool(config.hidden_size, config.hidden_size, config.dropout)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Encode clips.

        Args:
            pixel_values: Clips `(B, T, H, W)` or `(B, T, H, W, num_channels)` of any type.
            **kwargs: Arguments of other encoders, which have no effect here.

        Returns:
            `last_hidden_state` `(B, T, hidden_size)` and `pooler_output` `(B, hidden_size)`.

        Raises:
            ValueError: The shape does not fit `num_channels`.
        """
        frames = pixel_values.unsqueeze(-1) if pixel_values.ndim == 4 else pixel_values
        if frames.ndim != 5 or frames.shape[-1] != self.config.num_channels:
            raise ValueError(
                f"pixel_values must be of shape (B, T, H, W, {self.config.num_channels}), or (B, T, H, W) for a "
                f"single channel, got {tuple(pixel_values.shape)}; set num_channels to that of the data"
            )
        frames = self.standardise(frames, self.dtype).movedim(-1, 2)
        if self.training and self.config.shift:
            frames = _shift(frames, self.config.shift)
        if self.config.downsample > 1:
            frames = nn.functional.avg_pool2d(frames.flatten(0, 1), self.config.downsample).unflatten(
                0, frames.shape[:2]
            )
        if self.config.motion:
            frames = torch.cat([frames, frames.diff(dim=1, prepend=frames[:, :1])], dim=2)
        batch, steps = frames.shape[:2]
        hidden = self.frame(self.grid(self.layers(frames.flatten(0, 1))).flatten(1)).view(batch, steps, -1)
        hidden = self.temporal(hidden.transpose(1, 2)).transpose(1, 2)
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=self.pool(hidden))


def standardisation(values: torch.Tensor, num_channels: int) -> dict[str, list[float]]:
    """Compute the mean and the standard deviation of each channel, as settings of an encoder.

    Args:
        values: Training data, `(N, ..., num_channels)` or any shape that ends with the channels.
        num_channels: Number of channels.

    Returns:
        `input_mean` and `input_std`, a number per channel each.
    """
    rows = values.reshape(-1, num_channels).double()
    return {"input_mean": rows.mean(0).tolist(), "input_std": rows.std(0).clamp_min(1e-6).tolist()}


class _Standardise(nn.Module):
    """Standardisation of the inputs by the statistics in a configuration, with noise in training."""

    def __init__(self, config: SequenceEncoderConfig | FrameSequenceEncoderConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        values = values.to(torch.promote_types(dtype, torch.float32))
        if self.config.input_mean is not None:
            values = values - values.new_tensor(self.config.input_mean)
        if self.config.input_std is not None:
            values = values / values.new_tensor(self.config.input_std)
        if self.training and self.config.noise:
            values = values + self.config.noise * torch.randn_like(values)
        return values.to(dtype)


class _Pool(nn.Module):
    """Mean and maximum over time of `(B, T, D)`, projected to features `(B, hidden_size)` of unit deviation."""

    def __init__(self, size: int, hidden_size: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(2 * size)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(2 * size, hidden_size)
        self.features_norm = nn.LayerNorm(hidden_size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        pooled = torch.cat([hidden.mean(1), hidden.amax(1)], dim=-1)
        return self.features_norm(self.linear(self.dropout(self.norm(pooled))))


def _make_layer(
    convolution: type[nn.Module], width: int, channels: int, kernel_size: int, stride: int = 2
) -> nn.Module:
    groups = next(count for count in (8, 4, 2, 1) if channels % count == 0)
    return nn.Sequential(
        convolution(width, channels, kernel_size, stride=stride, padding=kernel_size // 2, bias=False),
        nn.GroupNorm(groups, channels),
        nn.GELU(),
    )


def _shift(frames: torch.Tensor, largest: int) -> torch.Tensor:
    """Shift each clip of `(B, T, C, H, W)` by up to `largest` pixels and repeat its edge at the border."""
    batch, _, _, height, width = frames.shape
    offsets = torch.randint(-largest, largest + 1, (2, batch, 1), device=frames.device)
    rows = (torch.arange(height, device=frames.device) + offsets[0]).clamp(0, height - 1)
    columns = (torch.arange(width, device=frames.device) + offsets[1]).clamp(0, width - 1)
    clips = torch.arange(batch, device=frames.device)[:, None, None]
    return frames.permute(0, 3, 4, 1, 2)[clips, rows[:, :, None], columns[:, None]].permute(0, 3, 4, 1, 2)


def _check_settings(config: SequenceEncoderConfig | FrameSequenceEncoderConfig, counts: tuple[str, ...]) -> None:
    for name in counts:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")
    if not 0 <= config.dropout < 1:
        raise ValueError(f"dropout must lie in [0, 1), got {config.dropout}")
    if config.noise < 0:
        raise ValueError(f"noise must be at least 0, got {config.noise}")
    for name in ("input_mean", "input_std"):
        given = getattr(config, name)
        if given is not None and len(given) != config.num_channels:
            raise ValueError(f"{name} has {len(given)} numbers for num_channels={config.num_channels}")


# `exist_ok`, because the module may be imported again (by a notebook that reloads, or under a worker's second path).
for _config, _model in ((SequenceEncoderConfig, SequenceEncoder), (FrameSequenceEncoderConfig, FrameSequenceEncoder)):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
