"""One finished run to publish."""

from pathlib import Path

import pytest
from testing.drawing import figures_drawn
from testing.tiny_recipe import tiny_recipe

from hf_dissect.runs.run import run_recipe

USER_HOME = Path("/home/zaphod")
"""Where this user lives; in no published file."""


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, not to be changed."""
    folder = tmp_path_factory.mktemp("zaphod-beeblebrox") / "runs" / "tiny"
    with figures_drawn():  # they are published
        run_recipe(tiny_recipe(folder, evaluation={"zero_shot": None}))
    return folder
