"""Makes every test offline, single-threaded and able to ask for a tiny model by name."""

import os

# transformers, datasets and tokenizers read these once, at import: they must stand before any of those imports.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import tiny_models
import torch
from datasets import Dataset
from transformers import PreTrainedModel, ProcessorMixin

torch.set_num_threads(1)


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
