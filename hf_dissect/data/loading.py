"""From the `data` section of a recipe to the splits of a run, with every mistake told before training starts."""

import zipfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset, Image, IterableDataset, IterableDatasetDict, List, Value
from datasets.features.features import FeatureType

from hf_dissect.data.arrow_columns import replace_column
from hf_dissect.data.files import folder_splits, image_column_of, image_folder_splits
from hf_dissect.data.noise import apply_caption_order, load_caption_order, shuffle_captions
from hf_dissect.data.scenes.drawing import make_scenes, scenes_features, scenes_generator
from hf_dissect.data.split_files import first_line
from hf_dissect.data.tar_shards import tar_shard_splits

SOURCES = ("scenes", "hub", "folder", "imagefolder", "webdataset")
FEATURES_COLUMN = "image_features"


def load_splits(
    *,
    source: str = "scenes",
    path: str | None = None,
    name: str | None = None,
    train_split: str = "train",
    validation_split: str | None = "validation",
    test_split: str | None = "test",
    streaming: bool = False,
    image_column: str | None = None,
    caption_column: str | None = None,
    id_column: str | None = None,
    task_column: str | None = None,
    clean_column: str | None = None,
    image_features: str | None = None,
    max_train_rows: int | None = None,
    max_eval_rows: int | None = None,
    noise_rate: float = 0.0,
    noise_seed: int = 0,
    noise_permutation: str | None = None,
    num_workers: int = 0,
    shuffle_buffer: int = 10_000,
    scenes_train: int = 4096,
    scenes_validation: int = 512,
    scenes_test: int = 512,
    scenes_image_size: int = 32,
    scenes_seed: int = 0,
    scenes_tasks: int = 1,
) -> dict[str, Dataset | IterableDataset]:
    """Loads the rows of a run.

    No image is decoded. A permutation of captions is applied to the whole train split before `max_train_rows` cuts
    it; a noise rate is applied to what the cut leaves. Both touch the train split only.

    Args:
        source: One of `SOURCES`.
        path: Hub id for "hub"; folder or file of Parquet, JSONL or CSV for "folder"; folder with `metadata.*` for
            "imagefolder"; folder, tar file, glob or brace pattern for "webdataset", on this machine or elsewhere (see
            `tar_shard_splits`).
        name: Configuration of a Hub data set.
        train_split, validation_split, test_split: Names of the splits in the source; None leaves the last two out.
        streaming: Read while training instead of before.
        image_column, caption_column: Columns to use; None recognises the usual names. They are not renamed.
        id_column, task_column, num_workers, shuffle_buffer: Of no meaning here; taken so that the whole section can be
            passed.
        clean_column: Where noise injection writes its truth, `clean` if None.
        image_features: `.npz` with one `(rows, dim)` array per split, named like the split; becomes the float32 column
            `image_features`. A relative path is looked up from here, then from `path`.
        max_train_rows, max_eval_rows: Keep the first rows only.
        noise_rate, noise_seed: See `shuffle_captions`.
        noise_permutation: `.npy` for `apply_caption_order`, looked up like `image_features`.
        scenes_train, scenes_validation, scenes_test, scenes_image_size, scenes_seed, scenes_tasks: Rows per split,
            pixels, seed and styles of the "scenes" source; 0 rows leave a split out.

    Returns:
        "train", and "validation" and "test" where the source has them.

    Raises:
        FileNotFoundError: If a file, folder or Hub data set is not there.
        ValueError: If an argument is out of its range, a file is unreadable, or there is no train split.
    """
    _check_arguments(source, path, streaming, image_features, noise_rate, noise_permutation)
    _check_limits(max_train_rows=max_train_rows, max_eval_rows=max_eval_rows)
    split_names = {"train": train_split, "validation": validation_split, "test": test_split}
    if source == "scenes":
        sizes = {"train": scenes_train, "validation": scenes_validation, "test": scenes_test}
        splits = _scenes_splits(sizes, scenes_image_size, scenes_seed, scenes_tasks, streaming)
    elif source == "hub":
        splits = _hub_splits(path, name, split_names, streaming)
    elif source == "folder":
        splits = folder_splits(path, split_names, image_column)
    elif source == "imagefolder":
        splits = image_folder_splits(path, split_names, image_column)
    else:
        splits = tar_shard_splits(path, split_names, streaming)
    splits = {split: _without_decoding(rows, image_column) for split, rows in splits.items()}
    if streaming and source in ("folder", "imagefolder"):
        # Already in Arrow files on the disk: what is left of streaming is the order of reading.
        splits = {split: rows.to_iterable_dataset(_shards(len(rows))) for split, rows in splits.items()}
    if image_features is not None:
        splits = _with_image_features(splits, _beside(image_features, path), split_names)

    train = splits["train"]
    if noise_permutation is not None:
        order = load_caption_order(_beside(noise_permutation, path))
        train = apply_caption_order(train, order, caption_column=caption_column, clean_column=clean_column)
    train = _first_rows(train, max_train_rows)
    if noise_rate:
        train = shuffle_captions(
            train, rate=noise_rate, seed=noise_seed, caption_column=caption_column, clean_column=clean_column
        )
    return {split: train if split == "train" else _first_rows(rows, max_eval_rows) for split, rows in splits.items()}


def _check_arguments(
    source: str,
    path: str | None,
    streaming: bool,
    image_features: str | None,
    noise_rate: float,
    noise_permutation: str | None,
) -> None:
    if source not in SOURCES:
        raise ValueError(f"data.source must be one of {', '.join(SOURCES)}, got {source!r}.")
    if source == "scenes" and path is not None:
        raise ValueError(
            f"data.path is {path!r}, but data.source is 'scenes', which reads no files. Set data.source to hub, "
            "folder, imagefolder or webdataset, or leave data.path out."
        )
    if source != "scenes" and not path:
        raise ValueError(
            f"data.path is missing: data.source {source!r} needs {'a Hub id' if source == 'hub' else 'a local path'}."
        )
    if isinstance(noise_rate, bool) or not isinstance(noise_rate, int | float) or not 0.0 <= noise_rate <= 1.0:
        raise ValueError(f"data.noise_rate must be a number between 0 and 1, got {noise_rate!r}.")
    if noise_rate and noise_permutation is not None:
        raise ValueError(
            f"data.noise_rate is {noise_rate} and data.noise_permutation is {noise_permutation!r}: both "
            "mismatch captions. Set one of them."
        )
    given = {
        "noise_rate": noise_rate or None,
        "noise_permutation": noise_permutation,
        "image_features": image_features,
    }
    for argument, value in given.items():
        if streaming and value is not None:
            raise ValueError(
                f"data.{argument} is {value!r} with data.streaming: it needs all rows at hand. Set "
                f"data.streaming to false, or leave data.{argument} out."
            )


def _check_limits(**limits: int | None) -> None:
    for argument, value in limits.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"data.{argument} must be an integer of at least 1, or null for all rows, got {value!r}.")


def _scenes_splits(
    sizes: dict[str, int], image_size: int, seed: int, tasks: int, streaming: bool
) -> dict[str, Dataset | IterableDataset]:
    for split, size in sizes.items():
        least = 1 if split == "train" else 0
        if isinstance(size, bool) or not isinstance(size, int) or size < least:
            raise ValueError(f"data.scenes_{split} must be an integer of at least {least}, got {size!r}.")
    splits = {}
    for split, size in sizes.items():
        if streaming and size:
            given = {"num_rows": size, "seed": seed, "image_size": image_size, "split": split, "tasks": tasks}
            splits[split] = IterableDataset.from_generator(
                scenes_generator, features=scenes_features(tasks=tasks), gen_kwargs=given
            )
        elif size:
            splits[split] = make_scenes(size, seed=seed, image_size=image_size, split=split, tasks=tasks)
    return splits


def _hub_splits(
    path: str, name: str | None, split_names: dict[str, str | None], streaming: bool
) -> dict[str, Dataset | IterableDataset]:
    what = f"data.path {path!r}" + (f" (data.name {name!r})" if name else "")
    try:
        found = datasets.load_dataset(path, name, streaming=streaming)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{what}: no such data set, or no access to it ({first_line(error)}). Check the id, log "
            "in with `hf auth login`, or set data.source to folder for local files."
        ) from error
    except Exception as error:  # whatever a download or a builder may raise, the way out is the same
        raise ValueError(
            f"{what}: the Hub data set cannot be loaded ({type(error).__name__}: {first_line(error)}). Check "
            "data.name, the connection, and that the data set needs no loading script (remote code is never run)."
        ) from error
    if not isinstance(found, dict | IterableDatasetDict):
        raise ValueError(f"{what}: expected a data set with splits, found {type(found).__name__}.")
    if split_names["train"] not in found:
        raise ValueError(
            f"data.train_split {split_names['train']!r} is not in {what}, which has {list(found)}. Name one of these."
        )
    return {split: found[given] for split, given in split_names.items() if given in found}


def _without_decoding(rows: Dataset | IterableDataset, image_column: str | None) -> Dataset | IterableDataset:
    """Image columns as bytes and path, so that a pair can be dropped before its picture is decoded."""
    named = image_column_of(rows, image_column)
    if rows.features is None:  # a stream that does not tell its columns
        return rows.cast_column(named, Image(decode=False))
    for column, feature in rows.features.items():
        if isinstance(feature, Image) or (column == named and _stores_images(feature)):
            rows = rows.cast_column(column, Image(decode=False))
    return rows


def _stores_images(feature: FeatureType) -> bool:
    if isinstance(feature, Value):
        return feature.dtype in ("string", "large_string", "binary", "large_binary")
    return isinstance(feature, dict) and bool(feature) and set(feature) <= {"bytes", "path"}


def _shards(num_rows: int) -> int:
    """As many as data workers may want; no shard may be empty."""
    return max(1, min(64, num_rows))


def _first_rows(rows: Dataset | IterableDataset, limit: int | None) -> Dataset | IterableDataset:
    if limit is None:
        return rows
    return rows.take(limit) if isinstance(rows, IterableDataset) else rows.select(range(min(limit, len(rows))))


def _with_image_features(
    splits: dict[str, Dataset], path: Path, split_names: dict[str, str | None]
) -> dict[str, Dataset]:
    if not path.is_file():
        raise FileNotFoundError(
            f"data.image_features: no file at {str(path)!r}. It names a .npz with one array per split."
        )
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except (ValueError, OSError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"data.image_features: {str(path)!r} is not a readable .npz of numbers ({first_line(error)}). Write "
            "it with numpy.savez(path, train=..., validation=..., test=...)."
        ) from error
    result = {}
    for split, rows in splits.items():
        key = next((key for key in (split_names[split], split) if key in arrays), None)
        if key is None:
            raise ValueError(
                f"data.image_features: {str(path)!r} has no array for the split {split_names[split]!r}, only "
                f"{list(arrays)}. Add one, or leave the split out (data.{split}_split: null)."
            )
        result[split] = _add_features(rows, arrays[key], f"array {key!r} of {str(path)!r}")
    return result


def _add_features(rows: Dataset, array: np.ndarray, what: str) -> Dataset:
    if array.ndim != 2 or array.shape[0] != len(rows) or not np.issubdtype(array.dtype, np.number):
        raise ValueError(
            f"data.image_features: {what} is {array.dtype} of shape {array.shape}, but the split has "
            f"{len(rows)} rows: it must be numbers of shape ({len(rows)}, dim), rows in the order of the data set."
        )
    dim = array.shape[1]
    column = pa.FixedSizeListArray.from_arrays(pa.array(array.astype(np.float32).reshape(-1)), dim)
    return replace_column(rows, FEATURES_COLUMN, column, List(Value("float32"), length=dim))


def _beside(file: str, path: str | None) -> Path:
    """The file as given, or next to the data when it is only there."""
    given = Path(file).expanduser()
    if path is None or given.exists():
        return given
    data = Path(path).expanduser()
    candidate = (data if data.is_dir() else data.parent) / file
    return candidate if candidate.exists() else given
