"""Reading of pairs as inputs of small encoders: each distinct image once, captions as tokens."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.functional import pad
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from hf_dissect.auditing.cross_fit import PairInputs
from hf_dissect.auditing.embeddings import PairEmbeddings
from hf_dissect.auditing.small_encoders import PICTURE_SIZE
from hf_dissect.data.pairs import PairDataset
from hf_dissect.data_collator import SelectionCollator
