"""Files, recipe and data of a saved model, for its evaluation or an audit by it."""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import pyarrow.parquet as pq

from hf_dissect.data import load_splits
from hf_dissect.data.files import FILE_NAME_COLUMN, METADATA_NAMES, TABLE_FORMATS
from hf_dissect.data.shards.files import is_remote, is_shard_name
from hf_dissect.distillation.recipe import DistillationDataSection
from hf_dissect.hub.address import HubAddress, is_hub_address
from hf_dissect.hub.published_files import RECIPE_FILE
from hf_dissect.hub.pull import download_model, pull_recipe
from hf_dissect.hub.reachability import HubNeed, check_reachable, is_on_hub
from hf_dissect.recipe.file import read_settings
from hf_dissect.recipe.recipe import DataSection, Recipe, RecipeError

logger = logging.getLogger(__name__)

_Section = TypeVar("_Section", DataSection, DistillationDataSection)
_Rows = TypeVar("_Rows")


def fetch_model(checkpoint: str) -> str:
    """Download the model at `hub:USER/REPO` and return its folder; return any other checkpoint as it is.

    Raises:
        HubError: The Hub has no such model.
        HubUnreachable: The model is on the Hub, which does not answer.
    """
    if is_on_hub(checkpoint):
        check_reachable([HubNeed("model", checkpoint)])
    return str(download_model(HubAddress.parse(checkpoint))) if is_hub_address(checkpoint) else checkpoint


def find_recipe_file(folder: Path, *, is_own: bool = True) -> Path | None:
    """Return the recipe next to a saved model, or None if there is none.

    Args:
        folder: Folder of a run or of one of its checkpoints.
        is_own: True for a folder of this machine, whose parent may be the run; False for a copy from the Hub.
    """
    places = (folder, folder.parent) if is_own else (folder,)
    return next((place / RECIPE_FILE for place in places if (place / RECIPE_FILE).is_file()), None)


def load_recipe(checkpoint: str) -> Recipe | None:
    """Load the recipe of a run, of one of its checkpoints or of `hub:USER/REPO`; return None if there is none.

    Raises:
        ValueError: The recipe on the Hub cannot be used.
    """
    if is_hub_address(checkpoint):
        try:
            return pull_recipe(HubAddress.parse(checkpoint), kind=Recipe)
        except RecipeError as error:
            raise ValueError(f"{error}\nName the data with --data.") from error
    file = find_recipe_file(Path(checkpoint))
    return None if file is None else Recipe.load(file)


def trains_with_mask(checkpoint: str) -> bool:
    """Return True if the recipe next to a model of this machine masks false negatives in the loss."""
    file = find_recipe_file(Path(checkpoint))
    try:
        section = {} if file is None else read_settings(file).get("selection")
    except RecipeError:  # of another version; the data are named, so that nothing else of it is needed
        return False
    return isinstance(section, Mapping) and section.get("mask_false_negatives") is True


def describe_missing_recipe(checkpoint: str) -> str:
    """Return the error message for a checkpoint without a recipe, when no data are named."""
    return f"{checkpoint} has no {RECIPE_FILE} to take the data from; name the data with --data."


def choose_data(checkpoint: str, data: str | None, recipe: Recipe | None) -> DataSection:
    """Return the data section for `data`, or that of the checkpoint's recipe if `data` is None.

    Args:
        checkpoint: Evaluated model, for the error message.
        data: "scenes", a local folder or file, tar shards, or the id of a data set on the Hub.
        recipe: Recipe of the checkpoint, if it has one.

    Raises:
        HubUnreachable: The data are on the Hub, which does not answer.
        ValueError: There are neither data nor a recipe.
    """
    if data is None:
        if recipe is None:
            raise ValueError(describe_missing_recipe(checkpoint))
        if recipe.data.source == "hub":
            check_reachable([HubNeed("data.path", str(recipe.data.path), "dataset", "name other data with --data")])
        return recipe.data
    if data == "scenes":
        return DataSection(source="scenes", scenes_train=1)
    source = recognise_source(data)
    if source == "hub":
        check_reachable([HubNeed("data", data, "dataset", "name a local file or folder")])
    return DataSection(source=source, path=data, streaming=source == "webdataset" and is_remote(data))


def recognise_source(data: str) -> str:
    """Return the source, as in `data.source` of a recipe, of a folder, a file, tar shards or a data set of the Hub.

    A folder whose metadata name its pictures as `file_name` is an "imagefolder", one with tar shards and no other
    tables than those that describe them a "webdataset".
    """
    place = Path(data).expanduser()
    if is_shard_name(data):
        return "webdataset"
    if not place.exists() and not data.startswith((".", "/", "~")):
        return "hub"
    files = [file for pattern in ("*", "*/*") for file in place.glob(pattern) if not file.name.startswith(".")]
    shards = {file.name.partition(".")[0] for file in files if is_shard_name(file.name)}
    tables = {file.stem for file in files if file.suffix.lower() in TABLE_FORMATS and not _describes_shard(file.stem)}
    if shards and tables <= shards:
        return "webdataset"
    return "imagefolder" if any(file.name in METADATA_NAMES and _names_files(file) for file in files) else "folder"


def _describes_shard(stem: str) -> bool:
    return stem.endswith("_stats")  # img2dataset writes one next to each shard


def _names_files(metadata: Path) -> bool:
    if metadata.suffix == ".parquet":
        return FILE_NAME_COLUMN in pq.read_schema(metadata).names
    with metadata.open("rb") as file:
        return FILE_NAME_COLUMN.encode() in file.readline(1 << 16)


def adapt_section(section: _Section, *, max_rows: int | None = None, **columns: str | None) -> _Section:
    """Return a data section with other columns and fewer rows; None leaves a setting as it is.

    Args:
        section: Data section of a recipe of any kind.
        max_rows: Number of rows to read in any split, from the first.
        columns: Settings such as `image_column` and their values.
    """
    given: dict[str, Any] = {"max_train_rows": max_rows, "max_eval_rows": max_rows, **columns}
    return dataclasses.replace(section, **{name: value for name, value in given.items() if value is not None})


def load_split(section: DataSection, split: str, *, whole: bool = True) -> Any:
    """Load one split of the data that a section describes, without weights and clusters of pairs; see `pick_split`."""
    of_training = {"weight_column": None, "balance_column": None}
    return pick_split(load_splits(**dataclasses.asdict(section) | of_training), split, whole=whole)


def pick_split(splits: Mapping[str, _Rows], split: str, *, whole: bool) -> _Rows:
    """Return one of several splits.

    Args:
        splits: Rows by the name of their split.
        split: Name of the wanted split.
        whole: True to warn and return all rows if the data have no splits at all; False to fail.

    Raises:
        ValueError: There is no such split.
    """
    if split in splits:
        return splits[split]
    if whole and list(splits) == ["train"]:
        logger.warning("The data have no split %r; all of them are evaluated.", split)
        return splits["train"]
    raise ValueError(f"split {split!r}: the data have {', '.join(splits)}; name one of these with --split.")
