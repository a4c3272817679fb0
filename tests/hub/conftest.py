"""A Hub on this machine for each test, and one finished run to publish."""

from collections.abc import Iterator
from pathlib import Path

import hub_client
import pytest
from loopback_hub import LoopbackHub, serving
from tiny_recipe import tiny_recipe

from hf_dissect.hub import repository
from hf_dissect.run_recipe import run_recipe

USER_HOME = Path("/home/zaphod")
"""Where this user lives; in no published file."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A Hub with the users ada, who is logged in, and bob."""
    monkeypatch.setattr(repository, "PAUSES", (0.01, 0.01))
    with serving() as running:
        hub_client.use(running, tmp_path / "huggingface", monkeypatch)
        yield running


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, not to be changed."""
    folder = tmp_path_factory.mktemp("zaphod-beeblebrox") / "runs" / "tiny"
    run_recipe(tiny_recipe(folder, evaluation={"zero_shot": None}))
    return folder
