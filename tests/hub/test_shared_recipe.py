"""What a recipe may share, of every setting that names a file or folder."""

import copy
import re
from typing import Any

import pytest

from hf_dissect.distillation import DistillationRecipe
from hf_dissect.hub.shared_recipe import find_private_places, select_shareable
from hf_dissect.recipe import Recipe
from hf_dissect.settings import list_members, list_settings

NEXT_TO_THE_DATA = {"data.image_features", "data.text_features", "data.noise_permutation"}


def places(recipe: type) -> list[str]:
    """The dotted keys of all settings whose help says that they name a place."""
    found = []

    def visit(key: str, section: type) -> None:
        for name, (expected, declaration) in list_settings(section).items():
            members = list_members(expected)
            if str in members and re.search(r"Hub id|Folder to which|\.np[yz]\b|run folder", declaration.help or ""):
                found.append(f"{key}.{name}")
            for member in members:
                if hasattr(member, "__dataclass_fields__"):
                    visit(f"{key}.{name}", member)

    for key, section in recipe.sections().items():
        visit(key, section)
    return found


PLACES = [*places(Recipe), *(key for key in places(DistillationRecipe) if key.startswith("student"))]


def nested(key: str, value: Any) -> dict:
    *sections, name = key.split(".")
    settings: dict[str, Any] = {name: value}
    for section in reversed(sections):
        settings = {section: settings}
    return settings


def test_there_are_such_settings():
    assert len(PLACES) >= 15
    assert {"data.image_root", "objective.repair.encoder", "selection.ledger", "student.processor"} <= set(PLACES)


@pytest.mark.parametrize("key", PLACES)
@pytest.mark.parametrize(
    "value", ["/home/ada/secret.npz", "~/secret.npz", "../secret.npz", "https://u:secret@host/x.npz"]
)
def test_a_place_of_one_machine_is_found_and_not_published(key, value):
    settings = nested(key, value)
    before = copy.deepcopy(settings)
    shared, left_out = select_shareable(settings)
    assert settings == before and left_out == [key]
    assert "secret" not in str(shared) or (key in NEXT_TO_THE_DATA and str(shared).count("secret.npz") == 1)
    assert find_private_places(settings) == {key: value}


@pytest.mark.parametrize(
    "key", sorted(set(PLACES) - NEXT_TO_THE_DATA - {"data.image_root", "evaluation.zero_shot.image_root"})
)
def test_a_place_of_the_hub_stays(key):
    section, _, name = key.rpartition(".")
    settings = nested(key, "hf://datasets/ada/x" if name in ("path", "ledger") else "ada/x")
    assert select_shareable(settings) == (settings, []) and find_private_places(settings) == {}
