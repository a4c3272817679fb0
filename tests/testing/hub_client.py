"""Points the real client of the Hub, as it is installed, at a Hub on this machine."""

from pathlib import Path

import datasets
import huggingface_hub
import pytest
import transformers.utils.hub
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from testing.loopback_hub import LoopbackHub

TOKEN = "hf_loopback_ada"


def use(hub: LoopbackHub, home: Path, patch: pytest.MonkeyPatch) -> None:
    """What the environment variables would do if they were set before the first import.

    `HF_ENDPOINT`, `HF_HUB_OFFLINE=0`, `HF_HOME`, `HF_HUB_DISABLE_XET=1` and `HF_TOKEN`.
    """
    patch.setattr(constants, "ENDPOINT", hub.address)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.address + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setattr(transformers.utils.hub, "_hf_api", None)
    # The functions of the package, such as file_exists, are methods of this one.
    patch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.address)
    patch.setattr(datasets.config, "HF_ENDPOINT", hub.address)
    patch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    patch.setattr(datasets.config, "HF_DATASETS_OFFLINE", False)
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")
    patch.setenv("HF_TOKEN", TOKEN)
    close_session()
