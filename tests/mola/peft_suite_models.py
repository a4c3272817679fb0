"""Makes stand-ins, with random weights, for what PEFT's tests download from the Hub.

They lie in the working directory under the names they have on the Hub, where `from_pretrained` and `load_dataset` look
first. Run in the folder from which PEFT's tests are started, which should be an empty one or PEFT's own.
"""

from pathlib import Path

import numpy as np
import torch
import transformers
from peft import LoraConfig
from PIL import Image

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
GPT_SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
TOKENS = {"vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 127}
LLAMA = SIZES | {"num_key_value_heads": 2, "max_position_embeddings": 64}
BART = {
    f"{part}_{name}": value
    for part in ("encoder", "decoder")
    for name, value in {"layers": 2, "attention_heads": 4, "ffn_dim": 64}.items()
}

# Name on the Hub, class of the model, class of its configuration, configuration.
MODELS = [
    ("peft-internal-testing/tiny-random-BertModel", "BertModel", "BertConfig", SIZES),
    ("peft-internal-testing/tiny-random-RobertaModel", "RobertaModel", "RobertaConfig", SIZES),
    ("peft-internal-testing/tiny-random-DebertaModel", "DebertaModel", "DebertaConfig", SIZES),
    ("peft-internal-testing/tiny-random-DebertaV2Model", "DebertaV2Model", "DebertaV2Config", SIZES),
    (
        "peft-internal-testing/tiny-random-BertForSequenceClassification",
        "BertForSequenceClassification",
        "BertConfig",
        SIZES,
    ),
    (
        "peft-internal-testing/tiny-random-RobertaForSequenceClassification",
        "RobertaForSequenceClassification",
        "RobertaConfig",
        SIZES,
    ),
    (
        "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2",
        "LlamaForSequenceClassification",
        "LlamaConfig",
        LLAMA,
    ),
    (
        "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated",
        "T5ForConditionalGeneration",
        "T5Config",
        {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
    ),
    (
        "peft-internal-testing/tiny-random-BartForConditionalGeneration",
        "BartForConditionalGeneration",
        "BartConfig",
        BART | {"d_model": 32, "max_position_embeddings": 64, "decoder_start_token_id": 127},
    ),
    (
        "peft-internal-testing/tiny-random-OPTForCausalLM",
        "OPTForCausalLM",
        "OPTConfig",
        SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    ),
    ("peft-internal-testing/tiny-random-GPT2LMHeadModel", "GPT2LMHeadModel", "GPT2Config", GPT_SIZES),
    (
        "peft-internal-testing/tiny-random-GPTJForCausalLM",
        "GPTJForCausalLM",
        "GPTJConfig",
        GPT_SIZES | {"rotary_dim": 4},
    ),
    ("trl-internal-testing/tiny-random-LlamaForCausalLM", "LlamaForCausalLM", "LlamaConfig", SIZES),
    ("peft-internal-testing/tiny-dummy-qwen2", "Qwen2ForCausalLM", "Qwen2Config", LLAMA),
    (
        "hf-internal-testing/tiny-random-Gemma3ForCausalLM",
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        LLAMA | {"head_dim": 8},
    ),
]
RESNET = "peft-internal-testing/tiny-random-ResNetForImageClassification"
LORA = "peft-internal-testing/tiny-opt-lora-revision"
IMAGE = "huggingface/cats-image/test/cat.png"


def make_stand_ins(folder: Path) -> None:
    """Write all of them under `folder`."""
    for name, model_class, config_class, settings in MODELS:
        torch.manual_seed(0)
        config = getattr(transformers, config_class)(**settings, **TOKENS)
        getattr(transformers, model_class)(config).save_pretrained(folder / name)
    torch.manual_seed(0)
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 16, 16], depths=[1] * 4, num_labels=3)
    transformers.ResNetForImageClassification(config).save_pretrained(folder / RESNET)
    transformers.ConvNextImageProcessor(size={"shortest_edge": 64}, crop_pct=1.0).save_pretrained(folder / RESNET)
    LoraConfig(task_type="CAUSAL_LM", base_model_name_or_path=MODELS[9][0]).save_pretrained(folder / LORA)
    (folder / IMAGE).parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / IMAGE)


if __name__ == "__main__":
    make_stand_ins(Path())
