"""Makes every test offline, single-threaded and able to ask for a tiny model, or a Hub on this machine, by name."""

import gc
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

# transformers, datasets and tokenizers read these once, at import: they must stand before any of those imports.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Each worker has its own caches: they neither wait for each other nor leave anything in the user's home.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="huggingface-")
# What tests start imports this checkout, whatever is installed, and the helpers.
os.environ["PYTHONPATH"] = os.pathsep.join(map(str, Path(__file__).parents[1::-1]))

import pytest
import torch
from datasets import Dataset
from testing import hub_client, tiny_models
from testing.drawing import figures_drawn, leave_out_drawing
from testing.loopback_hub import LoopbackHub, serving
from transformers import PreTrainedModel, ProcessorMixin

from hf_dissect.hub import repository

torch.set_num_threads(1)
leave_out_drawing()


def pytest_collection_finish() -> None:
    """Spare each training the walk through all imported modules: accelerate collects garbage at its start and end."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Remove the caches of this worker."""
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


@pytest.fixture(scope="module")
def drawn() -> Iterator[None]:
    """Draw figures from the first test of a module that asks for it to its last; they are empty otherwise."""
    with figures_drawn():
        yield


@pytest.fixture
def tiny_clip() -> tuple[PreTrainedModel, ProcessorMixin]:
    """A fresh CLIP model of two layers a tower, and its processor."""
    return tiny_models.tiny_clip()


@pytest.fixture
def tiny_siglip() -> tuple[PreTrainedModel, ProcessorMixin]:
    """A fresh SigLIP model of two layers a tower, and its processor."""
    return tiny_models.tiny_siglip()


@pytest.fixture
def tiny_dual_encoder() -> tuple[PreTrainedModel, ProcessorMixin]:
    """A fresh VisionTextDualEncoder (ViT and BERT, two layers each), and its processor."""
    return tiny_models.tiny_dual_encoder()


@pytest.fixture
def tiny_pairs() -> Dataset:
    """64 small pictures with a caption each."""
    return tiny_models.tiny_pairs()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A Hub with the users ada, who is logged in, and bob."""
    monkeypatch.setattr(repository, "PAUSES", (0.01, 0.01))
    with serving() as running:
        hub_client.use(running, tmp_path / "huggingface", monkeypatch)
        yield running
