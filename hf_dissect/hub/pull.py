"""Recipes and models from the Hub: read with care, as nobody knows who wrote them, and run below the own `runs/`."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download

from hf_dissect.hub.address import HubAddress
from hf_dissect.hub.published_files import LOADED
from hf_dissect.hub.repository import told
from hf_dissect.hub.shared_recipe import asks_for_remote_code, shareable
from hf_dissect.recipe import Recipe, RecipeError, read_settings

logger = logging.getLogger(__name__)

RUNS_FOLDER = "runs"
_REMOTE_CODE = "model.trust_remote_code"


def pull_recipe(address: HubAddress, overrides: Sequence[str] = (), output_dir: str | None = None) -> Recipe:
    """The recipe of a repository, to be run on this machine.

    Only the settings of the experiment are taken over (`shareable`): no path, nothing that pushes, reports or logs
    somewhere, nothing that loads code. The run's folder is `runs/<name of the recipe>`. What `overrides` say is the
    user's own and holds.

    Args:
        address: of the repository.
        overrides: `section.key=value`.
        output_dir: the run's folder instead.

    Raises:
        HubError: there is no such repository, it has no recipe, or it cannot be reached.
        RecipeError: the recipe is faulty, asks for remote code that the user did not allow, or its folder would lie
            outside of `runs/`.
    """
    settings = read_settings(_download(address))
    keys = {override.partition("=")[0].strip() for override in overrides}
    if asks_for_remote_code(settings) and _REMOTE_CODE not in keys:
        problem = (
            f"true lets code from the model's repository run; if you have read and trust it, add {_REMOTE_CODE}=true"
        )
        raise RecipeError(str(address), [f"{_REMOTE_CODE}: {problem}"])
    shared, left_out = shareable(settings)
    if left_out := [key for key in left_out if key not in keys | {"training.output_dir"}]:
        logger.warning(
            "Not taken over from %s: %s; set what you need by section.key=value.", address, ", ".join(left_out)
        )
    recipe = Recipe.from_dict(shared, str(address), overrides)
    if output_dir is not None:
        return dataclasses.replace(recipe, training=recipe.training | {"output_dir": output_dir})
    if "output_dir" not in recipe.training:
        _check_below_runs(recipe, address)
    return recipe


def download_model(address: HubAddress) -> Path:
    """A copy, in the cache, of what a repository has to load a model with; nothing that would have to be unpickled.

    Raises:
        HubError: there is no such repository, or it cannot be reached.
    """
    with told(address.repo_id):
        return Path(snapshot_download(address.repo_id, revision=address.revision, allow_patterns=list(LOADED)))


def _download(address: HubAddress) -> Path:
    with told(address.repo_id):
        return Path(hf_hub_download(address.repo_id, "recipe.yaml", revision=address.revision))


def _check_below_runs(recipe: Recipe, address: HubAddress) -> None:
    folder, runs = Path(recipe.output_dir), Path(RUNS_FOLDER)
    target = folder.resolve()
    if not target.is_relative_to(runs.resolve()):
        raise RecipeError(
            str(address),
            [f"its folder {folder} is a link to {target}, outside of {runs}; name another by --output-dir"],
        )
