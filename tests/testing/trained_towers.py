"""Folders of trained vision and text models, as people have them: tiny, with random weights."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    BartConfig,
    BartModel,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    ConvNextConfig,
    ConvNextForImageClassification,
    Dinov2Config,
    Dinov2Model,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2LMHeadModel,
    MPNetConfig,
    MPNetModel,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    RobertaConfig,
    RobertaModel,
    SwinConfig,
    SwinForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
)

from testing.tiny_models import TRANSFORMER, bert_tokenizer, square_image_processor

SQUARE = {**TRANSFORMER, "image_size": 32, "patch_size": 16}
STAGES = {"hidden_sizes": [8, 16, 24], "depths": [1, 1, 1]}
VISION: dict[str, Callable[[], PreTrainedModel]] = {
    "vit": lambda: ViTModel(ViTConfig(**SQUARE)),
    "vit_classifier": lambda: ViTForImageClassification(ViTConfig(**SQUARE)),
    "dinov2": lambda: Dinov2Model(
        Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16)
    ),
    "convnext": lambda: ConvNextForImageClassification(ConvNextConfig(num_stages=3, **STAGES)),
    "resnet": lambda: ResNetForImageClassification(ResNetConfig(embedding_size=8, **STAGES)),
    "swin": lambda: SwinForImageClassification(
        SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4)
    ),
    "mae": lambda: ViTMAEModel(ViTMAEConfig(**{**SQUARE, "patch_size": 8})),
}


def _tokens(**fields) -> dict:
    tokenizer = bert_tokenizer()
    return {
        **TRANSFORMER,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 24,
        "pad_token_id": tokenizer.pad_token_id,
        **fields,
    }


TEXT: dict[str, Callable[[], PreTrainedModel]] = {
    "bert": lambda: BertModel(BertConfig(**_tokens())),
    "bert_mlm": lambda: BertForMaskedLM(BertConfig(**_tokens())),
    "roberta": lambda: RobertaModel(RobertaConfig(**_tokens(pad_token_id=1))),
    "mpnet": lambda: MPNetModel(MPNetConfig(**_tokens(pad_token_id=1))),
    "distilbert": lambda: DistilBertModel(
        DistilBertConfig(
            vocab_size=len(bert_tokenizer()), dim=32, hidden_dim=64, n_layers=2, n_heads=2, max_position_embeddings=24
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=len(bert_tokenizer()), n_embd=32, n_layer=2, n_head=2, n_positions=24)
    ),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=len(bert_tokenizer()), d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
    ),
    "bart": lambda: BartModel(
        BartConfig(
            vocab_size=len(bert_tokenizer()),
            d_model=32,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            max_position_embeddings=24,
        )
    ),
}


def save_vision_tower(folder: Path, kind: str = "vit", seed: int = 0) -> str:
    """Write a vision model and its image processor, and return the folder."""
    torch.manual_seed(seed)
    VISION[kind]().eval().save_pretrained(folder)
    square_image_processor().save_pretrained(folder)
    return str(folder)


def save_text_tower(folder: Path, kind: str = "bert", *, sentence_pooling: str | None = None, seed: int = 0) -> str:
    """Write a text model and its tokenizer, and return the folder.

    With `sentence_pooling`, a key such as `pooling_mode_cls_token`, it is that of sentence-transformers.
    """
    torch.manual_seed(seed)
    TEXT[kind]().eval().save_pretrained(folder)
    bert_tokenizer().save_pretrained(folder)
    if sentence_pooling is not None:
        modules = [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        ]
        (folder / "1_Pooling").mkdir()
        (folder / "modules.json").write_text(json.dumps(modules))
        pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": False, sentence_pooling: True}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return str(folder)


def add_sentence_modules(folder: Path, *modules: dict, seed: int = 0) -> list[torch.nn.Linear]:
    """Add modules to the folder of a sentence-transformers model, and return the linear layers of the dense ones.

    A module is a `config.json` of a Dense, with `file` for the name of the file of its weights, or `{"type": ...}`.
    """
    torch.manual_seed(seed)
    listed, layers = json.loads((folder / "modules.json").read_text()), []
    for module in modules:
        kind = module.get("type", "Dense")
        path = f"{len(listed)}_{kind}"
        listed.append({"idx": len(listed), "name": path, "path": path, "type": f"sentence_transformers.models.{kind}"})
        (folder / path).mkdir()
        config = {key: value for key, value in module.items() if key not in ("type", "file")}
        (folder / path / "config.json").write_text(json.dumps(config))
        if kind == "Dense":
            linear = torch.nn.Linear(config["in_features"], config["out_features"], bias=config.get("bias", True))
            tensors = {f"linear.{name}": value.detach() for name, value in linear.named_parameters()}
            file = module.get("file", "model.safetensors")
            if file.endswith(".bin"):
                torch.save(tensors, folder / path / file)
            else:
                save_file(tensors, folder / path / file)
            layers.append(linear)
    (folder / "modules.json").write_text(json.dumps(listed))
    return layers
