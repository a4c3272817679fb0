"""Recipes and models from the Hub: read with care, as nobody knows who wrote them, and run below the own `runs/`."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from huggingface_hub import hf_hub_download, snapshot_download

from hf_dissect.hub.address import HubAddress
from hf_dissect.hub.published_files import LOADED, RECIPE_FILE
from hf_dissect.hub.repository import told
from hf_dissect.hub.shared_recipe import remote_code_keys, shareable
from hf_dissect.recipe.file import read_settings
from hf_dissect.recipe.recipe import Recipe, RecipeError

if TYPE_CHECKING:
    from hf_dissect.distillation.recipe import DistillationRecipe

logger = logging.getLogger(__name__)

RUNS_FOLDER = "runs"

_AnyRecipe = TypeVar("_AnyRecipe", Recipe, "DistillationRecipe")


def pull_recipe(
    address: HubAddress,
    overrides: Sequence[str] = (),
    output_dir: str | None = None,
    kind: type[_AnyRecipe] = Recipe,
) -> _AnyRecipe:
    """The recipe of a repository, to be run on this machine.

    Only the settings of the experiment are taken over (`shareable`): no path, nothing that pushes, reports or logs
    somewhere, nothing that loads code. The run's folder is `runs/<name of the recipe>`. What `overrides` say is the
    user's own and holds.

    Args:
        address: of the repository.
        overrides: `section.key=value`.
        output_dir: the run's folder instead.
        kind: `DistillationRecipe` for the recipe of a distillation.

    Raises:
        HubError: there is no such repository, it has no recipe, or it cannot be reached.
        RecipeError: the recipe is faulty or of another kind, asks for remote code that the user did not allow, or its
            folder would lie outside of `runs/`.
    """
    settings = pull_settings(address)
    keys = {override.partition("=")[0].strip() for override in overrides}
    if asking := [key for key in remote_code_keys(settings) if key not in keys]:
        problem = "true lets code from the model's repository run; if you have read and trust it, add"
        raise RecipeError(str(address), [f"{key}: {problem} {key}=true" for key in asking])
    shared, left_out = shareable(settings)
    if left_out := [key for key in left_out if key not in keys | {"training.output_dir"}]:
        logger.warning(
            "Not taken over from %s: %s; set what you need by section.key=value.", address, ", ".join(left_out)
        )
    recipe = kind.from_dict(shared, str(address), overrides)
    if output_dir is not None:
        return dataclasses.replace(recipe, training=recipe.training | {"output_dir": output_dir})
    if "output_dir" not in recipe.training:
        _check_below_runs(recipe, address)
    return recipe


def pull_settings(address: HubAddress) -> dict[str, Any]:
    """The settings in the recipe of a repository as somebody wrote them, unchecked and not to be acted upon.

    Raises:
        HubError: there is no such repository, it has no recipe, or it cannot be reached.
        RecipeError: it is no YAML file.
    """
    with told(address.repo_id):
        return read_settings(Path(hf_hub_download(address.repo_id, RECIPE_FILE, revision=address.revision)))


def download_model(address: HubAddress, more: Sequence[str] = ()) -> Path:
    """A copy, in the cache, of what a repository has to load a model with; nothing that would have to be unpickled.

    Args:
        address: of the repository.
        more: names of further files to fetch where they are there.

    Raises:
        HubError: there is no such repository, or it cannot be reached.
    """
    with told(address.repo_id):
        patterns = [*LOADED, *more]
        return Path(snapshot_download(address.repo_id, revision=address.revision, allow_patterns=patterns))


def _check_below_runs(recipe: "Recipe | DistillationRecipe", address: HubAddress) -> None:
    folder, runs = Path(recipe.output_dir), Path(RUNS_FOLDER)
    target = folder.resolve()
    if not target.is_relative_to(runs.resolve()):
        raise RecipeError(
            str(address),
            [f"its folder {folder} is a link to {target}, outside of {runs}; name another by --output-dir"],
        )
