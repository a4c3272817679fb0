"""MoLA, a mixture of low-rank adapters, as a PEFT method. Importing this package registers the method with PEFT."""

from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.mapping_func import MODEL_TYPE_TO_PEFT_MODEL_MAPPING

from hf_dissect.mola.attention import MultiheadAttention
from hf_dissect.mola.calls import pass_task_ids_on
from hf_dissect.mola.config import MOLA_TYPE, MolaConfig
from hf_dissect.mola.convolution import Conv2d
from hf_dissect.mola.decorrelation import decorrelation_loss
from hf_dissect.mola.layer import Linear, MolaLayer
from hf_dissect.mola.model import MolaModel
from hf_dissect.mola.router import EmbeddingRouter, PixelRouter, Router, register_router
from hf_dissect.mola.routing import Routing, mola_routing

__all__ = [
    "Conv2d",
    "EmbeddingRouter",
    "Linear",
    "MolaConfig",
    "MolaLayer",
    "MolaModel",
    "MultiheadAttention",
    "PixelRouter",
    "Router",
    "Routing",
    "decorrelation_loss",
    "mola_routing",
    "register_router",
]

# peft.utils.register_peft_method requires a member of PeftType, which only PEFT itself can add.
PEFT_TYPE_TO_CONFIG_MAPPING[MOLA_TYPE] = MolaConfig
PEFT_TYPE_TO_TUNER_MAPPING[MOLA_TYPE] = MolaModel
PEFT_TYPE_TO_PREFIX_MAPPING[MOLA_TYPE] = MolaModel.prefix

for _peft_model in set(MODEL_TYPE_TO_PEFT_MODEL_MAPPING.values()):
    pass_task_ids_on(_peft_model)
