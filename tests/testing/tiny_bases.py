"""Small base models for MoLA, adapters that have an effect from the start, and the layer formula written out."""

import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    ConvNextConfig,
    ConvNextModel,
    GPT2Config,
    GPT2Model,
    PreTrainedModel,
    RegNetConfig,
    RegNetModel,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTModel,
)
from transformers.pytorch_utils import Conv1D

from hf_dissect.mola import MolaConfig

TRANSFORMER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
VOCABULARY = {"vocab_size": 50, "max_position_embeddings": 16, "pad_token_id": 0}


def tiny_bert(seed: int = 0, num_hidden_layers: int = 2, hidden_size: int = 16) -> PreTrainedModel:
    """BERT of two layers, without dropout so that a training pass can be repeated."""
    torch.manual_seed(seed)
    fields = TRANSFORMER | VOCABULARY | {"num_hidden_layers": num_hidden_layers, "hidden_size": hidden_size}
    return BertModel(BertConfig(**fields, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)).eval()


def tiny_bert_classifier(seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return BertForSequenceClassification(BertConfig(**TRANSFORMER, **VOCABULARY, num_labels=3)).eval()


def tiny_vit(seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return ViTModel(ViTConfig(**TRANSFORMER, image_size=16, patch_size=8)).eval()


def tiny_gpt2(seed: int = 0) -> PreTrainedModel:
    """Its dense layers are the `Conv1D` of transformers."""
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
    return GPT2Model(config).eval()


def tiny_resnet(seed: int = 0) -> PreTrainedModel:
    """With batch-norm, and statistics that are not those of a fresh model."""
    torch.manual_seed(seed)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic")
    return _with_statistics(ResNetModel(config), seed)


def tiny_regnet(seed: int = 0) -> PreTrainedModel:
    """Grouped convolutions of 2 and 4 groups."""
    torch.manual_seed(seed)
    config = RegNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=4)
    return _with_statistics(RegNetModel(config), seed)


def tiny_convnext(seed: int = 0) -> PreTrainedModel:
    """Depthwise 7 x 7 convolutions beside dense layers on 4-D inputs."""
    torch.manual_seed(seed)
    config = ConvNextConfig(
        hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=2, layer_scale_init_value=1.0
    )
    return ConvNextModel(config).eval()


def _with_statistics(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if buffer.is_floating_point():
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + (0.5 if "var" in name else 0))
    return model.eval()


def tokens(batch_size: int = 4, length: int = 6) -> dict[str, torch.Tensor]:
    """Token ids, the longer rows full, the others padded."""
    ids = torch.randint(3, 50, (batch_size, length), generator=torch.Generator().manual_seed(batch_size))
    mask = torch.ones_like(ids)
    for row in range(1, batch_size, 2):
        mask[row, length - 1 - row % 3 :] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def pictures(batch_size: int = 4, size: int = 16, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch_size)
    return {"pixel_values": torch.randn(batch_size, 3, size, size, generator=generator, dtype=torch.float64).to(dtype)}


def adapted(base: nn.Module, adapter_name: str = "default", **fields) -> PeftModel:
    """The model with an adapter of three experts of rank 2, `B` at random so that it has an effect."""
    fields = {"num_experts": 3, "r": 2, "init_weights": False} | fields
    torch.manual_seed(7)
    return get_peft_model(base, MolaConfig(**fields), adapter_name).eval()


def naive_forward(
    base: nn.Module, x: torch.Tensor, adapters: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]]
) -> torch.Tensor:
    """`(W + alpha / r * sum_e gamma_e B_e A_e) x + b`, sample by sample with the full weight of each.

    `adapters` are the `(A, B, gamma, alpha / r)` of the active ones.
    """
    rows = []
    for i in range(len(x)):
        weight = base.weight.T if isinstance(base, Conv1D) else base.weight
        for A, B, gamma, scale in adapters:
            for e in range(len(A)):
                weight = weight + scale * gamma[i, e] * (B[e] @ A[e].flatten(1)).reshape(weight.shape)
        if isinstance(base, nn.Conv2d):
            rows.append(base._conv_forward(x[i : i + 1], weight, base.bias)[0])
        else:
            rows.append(F.linear(x[i], weight, base.bias))
    return torch.stack(rows)
