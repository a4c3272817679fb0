"""Loaders of hf_dissect and of its peers over the same tar shards: read, decode, resize, tokenise, batch."""

import inspect
import io
import tarfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import torch
from peer_steps import NotInstalled, import_peer
from PIL import Image

from hf_dissect import SelectionCollator
from hf_dissect.data import as_pairs
from hf_dissect.data.shards.reading import read_tar_shards
from hf_dissect.data.streaming.loader import StreamLoader

LOADERS = ("hf_dissect", "webdataset", "open_clip")
SIDE, TOKENS = 224, 32
_NOUNS = ("gradient", "cloud", "field", "sky", "wall", "lake")


def draw_picture(random: np.random.Generator, side: int) -> Image.Image:
    """Draw a colour gradient with noise of the strength of a photograph's."""
    across, down = np.meshgrid(np.linspace(0, 1, side), np.linspace(0, 1, side))
    weights = random.uniform(-1, 1, (3, 3))
    smooth = np.stack([row[0] * across + row[1] * down + row[2] * np.sin(9 * across * down) for row in weights], -1)
    noisy = 128 + 90 * smooth + random.normal(0, 6, smooth.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def write_shards(folder: Path, num_shards: int, per_shard: int, side: int = 256) -> list[Path]:
    """Write shards of pictures (.jpg) with captions (.txt), the same for the same sizes."""
    random, paths = np.random.default_rng(0), []
    for shard in range(num_shards):
        paths.append(folder / f"pairs-{shard:03}.tar")
        with tarfile.open(paths[-1], "w") as archive:
            for row in range(per_shard):
                buffer = io.BytesIO()
                draw_picture(random, side).save(buffer, "JPEG", quality=90)
                caption = f"picture {row} of a {_NOUNS[row % len(_NOUNS)]} in number {shard}"
                for ending, content in (("jpg", buffer.getvalue()), ("txt", caption.encode())):
                    member = tarfile.TarInfo(f"{shard:03}{row:06}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return paths


def list_captions(paths: list[Path], most: int = 500) -> list[str]:
    """Return the first captions of the shards, to train a tokenizer on."""
    captions: list[str] = []
    for path in paths:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.name.endswith(".txt") and (file := archive.extractfile(member)) is not None:
                    captions.append(file.read().decode(errors="replace"))
                    if len(captions) == most:
                        return captions
    return captions


def open_loader(
    name: str, paths: list[Path], processor: Any, batch: int, workers: int, buffer: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield batches of pictures `(batch, 3, 224, 224)` and tokens `(batch, 32)` without end.

    Args:
        name: One of `LOADERS`.
        paths: Shards.
        processor: Processor whose tokenizer all of them use, and whose image processor hf_dissect uses.
        batch: Number of pairs in a batch.
        workers: Number of worker processes.
        buffer: Number of pairs among which they are shuffled.

    Raises:
        NotInstalled: The package is missing.
    """
    opened: dict[str, Callable[..., Iterator]] = {
        "hf_dissect": _open_own,
        "webdataset": _open_webdataset,
        "open_clip": _open_open_clip,
    }
    return opened[name](paths, processor, batch, workers, buffer)


def _join(paths: list[Path]) -> str:
    """Return a pattern that means the shards, which lie in one folder."""
    return f"{paths[0].parent}/{{{','.join(path.name for path in paths)}}}" if len(paths) > 1 else str(paths[0])


def _open_own(paths: list[Path], processor: Any, batch: int, workers: int, buffer: int) -> Iterator:
    rows = read_tar_shards(_join(paths), {"train": "train", "validation": None, "test": None}, streaming=True)["train"]
    collator = SelectionCollator(processor, text_padding="max_length", max_caption_length=TOKENS)
    loader = StreamLoader(as_pairs(rows), collator, batch, num_workers=workers, shuffle_buffer=buffer)
    return ((found["pixel_values"], found["input_ids"]) for found in loader)


def _make_transforms(processor: Any) -> Any:
    """Return open_clip's transform for evaluation: the shorter side to 224, bicubic, and the middle of it."""
    mean, std = (tuple(getattr(processor.image_processor, f"image_{name}")) for name in ("mean", "std"))
    try:
        image_transform = import_peer("open_clip.transform", "open_clip_torch").image_transform
        return image_transform(SIDE, is_train=False, mean=mean, std=std)
    except NotInstalled:
        transforms = import_peer("torchvision.transforms", "torchvision")
        resize = transforms.Resize(SIDE, transforms.InterpolationMode.BICUBIC)
        steps = [resize, transforms.CenterCrop(SIDE), transforms.ToTensor(), transforms.Normalize(mean, std)]
        return transforms.Compose(steps)


class _Tokenizer:
    """The tokenizer of the processor, with the interface of those of open_clip."""

    def __init__(self, processor: Any) -> None:
        self._tokenizer = processor.tokenizer

    def __call__(self, texts: Any) -> torch.Tensor:
        texts = [texts] if isinstance(texts, str) else texts
        settings = {"padding": "max_length", "max_length": TOKENS, "truncation": True, "return_tensors": "pt"}
        return self._tokenizer(texts, **settings)["input_ids"]


class _First:
    def __init__(self, tokenise: Callable) -> None:
        self._tokenise = tokenise

    def __call__(self, text: str) -> torch.Tensor:
        return self._tokenise(text)[0]


def _open_webdataset(paths: list[Path], processor: Any, batch: int, workers: int, buffer: int) -> Iterator:
    wds = import_peer("webdataset", "webdataset")
    pairs = wds.WebDataset([str(path) for path in paths], shardshuffle=len(paths), empty_check=False)
    pairs = pairs.repeat().shuffle(buffer, initial=buffer).decode("pilrgb").to_tuple("jpg", "txt")
    pairs = pairs.map_tuple(_make_transforms(processor), _First(_Tokenizer(processor))).batched(batch, partial=False)
    return iter(wds.WebLoader(pairs, batch_size=None, num_workers=workers))


def _open_open_clip(paths: list[Path], processor: Any, batch: int, workers: int, buffer: int) -> Iterator:
    data = import_peer("open_clip_train.data", "open_clip_torch")
    if "eof_value" in inspect.signature(data.tar_file_expander).parameters:
        # webdataset 1 marks the end of a file by an empty sample, which open_clip 3.3 takes for a damaged one.
        data.tar_file_expander = partial(data.tar_file_expander, eof_value=None)
    data._SAMPLE_SHUFFLE_SIZE = data._SAMPLE_SHUFFLE_INITIAL = buffer  # 5,000 and 1,000 as it comes
    args = SimpleNamespace(
        train_data=_join(paths),
        train_num_samples=10**7,
        dataset_resampled=True,  # an epoch without end
        train_data_upsampling_factors=None,
        seed=0,
        batch_size=batch,
        workers=workers,
        world_size=1,
    )
    info = data.get_wds_dataset(args, _make_transforms(processor), is_train=True, tokenizer=_Tokenizer(processor))
    return iter(info.dataloader)


class Stopwatch:
    """Seconds of the wall clock, and of the processors for this process and its workers, since it was made."""

    def __init__(self) -> None:
        self._wall, self._processor = time.perf_counter(), _count_processor_seconds()

    def read(self) -> tuple[float, float]:
        """Return both."""
        return time.perf_counter() - self._wall, _count_processor_seconds() - self._processor


def _count_processor_seconds() -> float:
    seconds, own = time.process_time(), psutil.Process()
    for process in own.children(recursive=True):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        seconds += times.user + times.system
    return seconds
