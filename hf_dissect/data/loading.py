"""Load the splits that the `data` section of a recipe describes, and report every mistake before training starts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, IterableDataset, IterableDatasetDict

from hf_dissect.data.files import (
    find_image_column,
    holds_tar_shards_of_img2dataset,
    read_folder,
    read_image_folder,
)
from hf_dissect.data.noise import apply_caption_order, load_caption_order
from hf_dissect.data.noise_kinds import NOISE_KINDS, mismatch_captions
from hf_dissect.data.picture_paths import make_paths_absolute
from hf_dissect.data.reading_options import DEFAULT_TEMPLATE, ReadingOptions, check_reading_options
from hf_dissect.data.scenes.drawing import make_scenes, scenes_features, scenes_generator
from hf_dissect.data.shards.reading import read_tar_shards
from hf_dissect.data.split_files import summarize_error
from hf_dissect.data.stored_features import add_image_features, add_text_features
from hf_dissect.data.undecoded_columns import stop_decoding

SOURCES = ("scenes", "hub", "folder", "imagefolder", "webdataset")


def load_splits(
    *,
    source: str = "scenes",
    path: str | None = None,
    name: str | None = None,
    train_split: str = "train",
    validation_split: str | None = "validation",
    test_split: str | None = "test",
    streaming: bool = False,
    skip_bad_shards: bool = False,
    image_column: str | None = None,
    caption_column: str | None = None,
    id_column: str | None = None,
    task_column: str | None = None,
    clean_column: str | None = None,
    weight_column: str | None = None,
    balance_column: str | None = None,
    balance_strength: float = 0.5,
    balance_max_visits: int = 8,
    sampling_file: str | None = None,
    separator: str | None = None,
    encoding: str | None = None,
    image_root: str | None = None,
    class_template: str = DEFAULT_TEMPLATE,
    image_features: str | None = None,
    text_features: str | None = None,
    max_train_rows: int | None = None,
    max_eval_rows: int | None = None,
    noise_rate: float = 0.0,
    noise_seed: int = 0,
    noise_kind: str = "random",
    noise_permutation: str | None = None,
    num_workers: int = 0,
    shuffle_buffer: int = 10_000,
    image_size: Any = None,
    fast_decoding: bool = False,
    scenes_train: int = 4096,
    scenes_validation: int = 512,
    scenes_test: int = 512,
    scenes_image_size: int = 32,
    scenes_seed: int = 0,
    scenes_tasks: int = 1,
) -> dict[str, Dataset | IterableDataset]:
    """Load the rows of a run without decoding an image.

    A permutation of captions is applied to the whole train split before `max_train_rows` cuts it, a noise rate to the
    rows that the cut leaves, of which the kind "absent" leaves some out. Both change the train split only.

    Args:
        source: One of `SOURCES`.
        path: Hub id for "hub"; file or folder that `read_folder` recognises for "folder"; folder of pictures, with
            `metadata.*` or as in `read_pictures`, for "imagefolder"; folder, tar file, glob or brace pattern for
            "webdataset", on this machine or elsewhere (see `read_tar_shards`).
        name: Configuration of a Hub data set.
        train_split: Name of the train split in the source.
        validation_split: Name of the validation split in the source; None leaves it out.
        test_split: Name of the test split in the source; None leaves it out.
        streaming: Whether to read while training instead of before.
        skip_bad_shards: Whether to skip the rest of a damaged shard of "webdataset", with a warning.
        image_column: Column with the images; None recognises the usual names. It keeps its name.
        caption_column: Column with the captions; None recognises the usual names. It keeps its name.
        id_column: Column with the ids; in text files, integers or text.
        task_column: Column with the tasks; in text files, integers or text.
        clean_column: Column for the truth about injected noise, `clean` if None.
        weight_column: Column with the weights of the train split.
        balance_column: Column with the clusters of the train split; in text files, integers or text.
        balance_strength: Not used, like `num_workers`.
        balance_max_visits: Not used, like `num_workers`.
        sampling_file: Not used, like `num_workers`.
        separator: Character between the fields of `.csv` and `.tsv` files; None takes it from the header.
        encoding: Encoding of text files; None for UTF-8. A byte order mark comes before either.
        image_root: Folder to which the paths of pictures in tables are relative; None for the folder of the table.
        class_template: Caption of a picture in a class folder, with {} or {class} for the name of the folder.
        image_features: `.npz` file with one `(rows, dim)` array per split, named like the split, for the float32
            column `image_features`. A relative path starts here or, if there is no such file, at `path`.
        text_features: `.npz` file with one `(captions, dim)` array per split, found like `image_features`, for the
            column `text_features`. Captions that are exchanged take their features along.
        max_train_rows: Number of rows of the train split to keep, from the first; None keeps all.
        max_eval_rows: Number of rows of each other split to keep, from the first; None keeps all.
        noise_rate: Share of the pairs to mismatch, see `mismatch_captions`.
        noise_seed: Seed of the mismatches.
        noise_kind: One of `NOISE_KINDS`, see `mismatch_captions`.
        noise_permutation: `.npy` file for `apply_caption_order`, found like `image_features`.
        num_workers: Not used; accepted so that the whole section can be passed.
        shuffle_buffer: Not used, like `num_workers`.
        image_size: Not used, like `num_workers`.
        fast_decoding: Not used, like `num_workers`.
        scenes_train: Number of train rows of the "scenes" source.
        scenes_validation: Number of its validation rows; 0 leaves the split out.
        scenes_test: Number of its test rows; 0 leaves the split out.
        scenes_image_size: Width and height of its pictures, in pixels.
        scenes_seed: Seed of its pictures.
        scenes_tasks: Number of styles, which are its tasks.

    Returns:
        Rows by split: "train", and "validation" and "test" where the source has them.

    Raises:
        FileNotFoundError: If a file, folder or Hub data set is missing.
        ValueError: If an argument is out of its range, a file is unreadable, or there is no train split.
    """
    _check_arguments(source, path, streaming, image_features, text_features)
    _check_noise(noise_rate, noise_kind, noise_permutation, streaming, text_features)
    options = ReadingOptions(
        separator=separator,
        encoding=encoding,
        image_root=image_root,
        class_template=class_template,
        image_column=image_column,
        caption_column=caption_column,
        id_column=id_column,
        task_column=task_column,
        clean_column=clean_column,
        weight_column=weight_column,
        balance_column=balance_column,
    )
    check_reading_options(options, source, streaming)
    address = path or ""  # an empty one was refused for the sources that read it
    _check_limits(max_train_rows=max_train_rows, max_eval_rows=max_eval_rows)
    split_names = {"train": train_split, "validation": validation_split, "test": test_split}
    if source == "folder" and holds_tar_shards_of_img2dataset(address):
        source = "webdataset"  # the tables next to the shards hold no pictures
    if skip_bad_shards and source != "webdataset":
        raise ValueError(f"data.skip_bad_shards is true, but data.source is {source!r}, which has no shards.")
    if source == "scenes":
        sizes = {"train": scenes_train, "validation": scenes_validation, "test": scenes_test}
        splits = _make_scenes_splits(sizes, scenes_image_size, scenes_seed, scenes_tasks, streaming)
    elif source == "hub":
        splits = _load_from_hub(address, name, split_names, streaming)
        if image_root is not None:
            splits = {split: _resolve_paths(rows, options) for split, rows in splits.items()}
    elif source == "folder":
        splits = dict(read_folder(address, split_names, options))
    elif source == "imagefolder":
        splits = dict(read_image_folder(address, split_names, options))
    else:
        splits = read_tar_shards(
            address,
            split_names,
            streaming,
            image_column=image_column,
            caption_column=caption_column,
            id_column=id_column,
            task_column=task_column,
            clean_column=clean_column,
            weight_column=weight_column,
            balance_column=balance_column,
            skip_bad_shards=skip_bad_shards,
        )
    splits = {split: stop_decoding(rows, image_column) for split, rows in splits.items()}
    if streaming and source in ("folder", "imagefolder"):
        # These rows already lie in Arrow files: streaming only changes the order in which they are read.
        splits = {split: rows.to_iterable_dataset(_choose_num_shards(len(rows))) for split, rows in splits.items()}
    if image_features is not None:
        splits = add_image_features(splits, _find_file(image_features, path), split_names)
    if text_features is not None:
        splits = add_text_features(splits, _find_file(text_features, path), split_names, caption_column)

    train = splits["train"]
    if noise_permutation is not None:
        order = load_caption_order(_find_file(noise_permutation, path))
        train = apply_caption_order(train, order, caption_column=caption_column, clean_column=clean_column)
    train = _keep_first_rows(train, max_train_rows)
    if noise_rate:
        train = mismatch_captions(
            train,
            kind=noise_kind,
            rate=noise_rate,
            seed=noise_seed,
            image_column=image_column,
            caption_column=caption_column,
            clean_column=clean_column,
        )
    return {
        split: train if split == "train" else _keep_first_rows(rows, max_eval_rows) for split, rows in splits.items()
    }


def _check_arguments(
    source: str,
    path: str | None,
    streaming: bool,
    image_features: str | None,
    text_features: str | None,
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
    _refuse_for_streams(streaming, image_features=image_features, text_features=text_features)


def _check_noise(
    noise_rate: float, noise_kind: str, noise_permutation: str | None, streaming: bool, text_features: str | None
) -> None:
    if isinstance(noise_rate, bool) or not isinstance(noise_rate, int | float) or not 0.0 <= noise_rate <= 1.0:
        raise ValueError(f"data.noise_rate must be a number between 0 and 1, got {noise_rate!r}.")
    if noise_rate and noise_permutation is not None:
        raise ValueError(
            f"data.noise_rate is {noise_rate} and data.noise_permutation is {noise_permutation!r}: both "
            "mismatch captions. Set one of them."
        )
    if noise_kind not in NOISE_KINDS:
        raise ValueError(f"data.noise_kind must be one of {', '.join(NOISE_KINDS)}, got {noise_kind!r}.")
    if noise_kind != "random" and not noise_rate:
        raise ValueError(
            f"data.noise_kind is {noise_kind!r}, but data.noise_rate is {noise_rate}: no caption would be changed. "
            "Set data.noise_rate to the share of captions to change, or leave data.noise_kind out."
        )
    if noise_kind == "partial" and text_features is not None:
        raise ValueError(
            f"data.noise_kind is 'partial', which changes words, but data.text_features is {text_features!r}: the "
            "stored features would stay as they are. Set data.noise_kind to random, neighbours or absent, or leave "
            "data.text_features out."
        )
    _refuse_for_streams(streaming, noise_rate=noise_rate or None, noise_permutation=noise_permutation)


def _refuse_for_streams(streaming: bool, **given: object) -> None:
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


def _make_scenes_splits(
    sizes: Mapping[str, int], image_size: int, seed: int, tasks: int, streaming: bool
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


def _load_from_hub(
    path: str, name: str | None, split_names: Mapping[str, str | None], streaming: bool
) -> dict[str, Dataset | IterableDataset]:
    what = f"data.path {path!r}" + (f" (data.name {name!r})" if name else "")
    try:
        found = datasets.load_dataset(path, name, streaming=streaming)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{what}: no such data set, or no access to it ({summarize_error(error)}). Check the id, log "
            "in with `hf auth login`, or set data.source to folder for local files."
        ) from error
    except Exception as error:  # downloads and builders raise errors of many kinds, with the same way out
        raise ValueError(
            f"{what}: the Hub data set cannot be loaded ({type(error).__name__}: {summarize_error(error)}). Check "
            "data.name, the connection, and that the data set needs no loading script (remote code is never run)."
        ) from error
    if not isinstance(found, dict | IterableDatasetDict):
        raise ValueError(f"{what}: expected a data set with splits, found {type(found).__name__}.")
    if split_names["train"] not in found:
        raise ValueError(
            f"data.train_split {split_names['train']!r} is not in {what}, which has {list(found)}. Name one of these."
        )
    return {split: found[given] for split, given in split_names.items() if given in found}


def _resolve_paths(rows: Any, options: ReadingOptions) -> Dataset:
    column = find_image_column(rows, options.image_column)
    return make_paths_absolute(rows, column, options.picture_root(Path()))


def _choose_num_shards(num_rows: int) -> int:
    """Return a number of shards that suffices for many data workers and leaves no shard empty."""
    return max(1, min(64, num_rows))


def _keep_first_rows(rows: Dataset | IterableDataset, limit: int | None) -> Dataset | IterableDataset:
    if limit is None:
        return rows
    return rows.take(limit) if isinstance(rows, IterableDataset) else rows.select(range(min(limit, len(rows))))


def _find_file(file: str, path: str | None) -> Path:
    """Return the file as given, or the one next to the data if only that exists."""
    given = Path(file).expanduser()
    if path is None or given.exists():
        return given
    data = Path(path).expanduser()
    candidate = (data if data.is_dir() else data.parent) / file
    return candidate if candidate.exists() else given
