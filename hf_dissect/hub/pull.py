"""Recipes, models and scores from the Hub: read with care, as their authors are unknown, and run below `runs/`."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import hf_hub_download, snapshot_download

from hf_dissect.data.sampling_file import SamplingWeights, read_sampling_file
from hf_dissect.hub.address import HubAddress, is_hub_address
from hf_dissect.hub.published_files import LOADED, RECIPE_FILE
from hf_dissect.hub.reachability import HubNeed, check_reachable
from hf_dissect.hub.repository import explain_hub_errors
from hf_dissect.hub.shared_recipe import find_remote_code_keys, select_shareable
from hf_dissect.recipe.fields import RecipeError
from hf_dissect.recipe.file import RecipeFile, read_settings
from hf_dissect.selection.ledger import SavedLedger
from hf_dissect.selection.ledger_files import read_scores

logger = logging.getLogger(__name__)

RUNS_FOLDER = "runs"

_AnyRecipe = TypeVar("_AnyRecipe", bound=RecipeFile)


def pull_recipe(
    address: HubAddress,
    overrides: Sequence[str] = (),
    output_dir: str | None = None,
    *,
    kind: type[_AnyRecipe],
) -> _AnyRecipe:
    """Read the recipe of a repository, to be run on this machine.

    Only the settings of the experiment are taken over (`select_shareable`): no path, nothing that pushes, reports or
    logs somewhere, nothing that loads code. The run folder is `runs/<name of the recipe>`. `overrides` are the user's
    own settings and always apply.

    Args:
        address: Repository.
        overrides: Settings, each as `section.key=value`.
        output_dir: Run folder to use instead.
        kind: Class of the recipe.

    Raises:
        HubError: The repository is missing, has no recipe, or cannot be reached.
        RecipeError: The recipe is faulty or of another kind, asks for remote code that the user did not allow, or its
            folder would be outside of `runs/`.
    """
    settings = pull_settings(address)
    keys = {override.partition("=")[0].strip() for override in overrides}
    if asking := [key for key in find_remote_code_keys(settings) if key not in keys]:
        problem = "true lets code from the model's repository run; if you have read and trust it, add"
        raise RecipeError(str(address), [f"{key}: {problem} {key}=true" for key in asking])
    shared, left_out = select_shareable(settings)
    if left_out := [key for key in left_out if key not in keys | {"training.output_dir"}]:
        logger.warning(
            "Not taken over from %s: %s; set what you need by section.key=value.", address, ", ".join(left_out)
        )
    recipe = kind.from_dict(shared, str(address), overrides)
    if output_dir is not None:
        replaced: Any = recipe  # a dataclass, which its base is not
        return dataclasses.replace(replaced, training=recipe.training | {"output_dir": output_dir})
    if "output_dir" not in recipe.training:
        _check_below_runs(recipe, address)
    return recipe


def pull_settings(address: HubAddress) -> dict[str, Any]:
    """Read the settings in the recipe of a repository as they were written, unchecked and not to be acted upon.

    Raises:
        HubError: The repository is missing, has no recipe, or cannot be reached.
        RecipeError: The recipe is not a YAML file.
    """
    check_reachable([HubNeed("recipe", str(address))])
    with explain_hub_errors(address.repo_id):
        return read_settings(Path(hf_hub_download(address.repo_id, RECIPE_FILE, revision=address.revision)))


def download_model(address: HubAddress, more: Sequence[str] = ()) -> Path:
    """Download the files of a repository to load a model from, without any that would have to be unpickled.

    Args:
        address: Repository.
        more: Names of further files to download where they exist.

    Returns:
        Folder in the cache.

    Raises:
        HubError: The repository is missing, or cannot be reached.
    """
    check_reachable([HubNeed("model", str(address))])
    with explain_hub_errors(address.repo_id):
        patterns = [*LOADED, *more]
        return Path(snapshot_download(address.repo_id, revision=address.revision, allow_patterns=patterns))


def download_scores(address: HubAddress) -> Path:
    """Download the tables of a data set of scores that `hf-dissect push-ledger` published.

    Returns:
        Folder in the cache.

    Raises:
        HubError: The data set is missing, or cannot be reached.
    """
    check_reachable([HubNeed("scores", str(address), "dataset", "name a local file")])
    with explain_hub_errors(address.repo_id, "dataset"):
        return Path(
            snapshot_download(
                address.repo_id, repo_type="dataset", revision=address.revision, allow_patterns="data/*.parquet"
            )
        )


def read_shared_scores(source: str) -> SavedLedger:
    """Read scores of pairs from this machine or from a data set of the Hub.

    Args:
        source: Path (see `read_scores`), or `hub:USER/REPO`.

    Raises:
        FileNotFoundError: There is no ledger.
        ValueError: The ledger is damaged or something else, or its ids repeat.
        HubError: The data set is missing, or cannot be reached.
    """
    path = download_scores(HubAddress.parse(source)) if is_hub_address(source) else Path(source)
    return read_scores(path, name=source)


def read_shared_weights(source: str) -> SamplingWeights:
    """Read weights of pairs from this machine or from a data set of the Hub.

    Args:
        source: Path (see `read_sampling_file`), or `hub:USER/REPO`, whose Parquet files lie below `data`.

    Raises:
        FileNotFoundError: There is no sampling file.
        ValueError: The file is damaged or something else.
        HubError: The data set is missing, or cannot be reached.
    """
    path = download_scores(HubAddress.parse(source)) if is_hub_address(source) else Path(source)
    return read_sampling_file(path, name=source)


def _check_below_runs(recipe: RecipeFile, address: HubAddress) -> None:
    folder, runs = Path(recipe.output_dir), Path(RUNS_FOLDER)
    target = folder.resolve()
    if not target.is_relative_to(runs.resolve()):
        raise RecipeError(
            str(address),
            [f"its folder {folder} is a link to {target}, outside of {runs}; name another by --output-dir"],
        )
