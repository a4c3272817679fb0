"""Makes stand-ins, with random weights, for what PEFT's tests download from the Hub.

They lie in the working directory under the names they have on the Hub, where `from_pretrained` and `load_dataset` look
first. Run in the folder from which PEFT's tests are started, which should be an empty one or PEFT's own.
"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers
from peft import LoraConfig
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

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
    # For the tests on quantised bases, which count the layers and compare with the base that is not quantised.
    (
        "peft-internal-testing/opt-125m",
        "OPTForCausalLM",
        "OPTConfig",
        {
            **{"hidden_size": 64, "num_hidden_layers": 12, "num_attention_heads": 4, "ffn_dim": 128},
            **{"word_embed_proj_dim": 64, "max_position_embeddings": 64, "init_std": 0.1},
        },
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
OPT = "peft-internal-testing/tiny-random-OPTForCausalLM"
QUOTES = "ybelkada/english_quotes_copy"
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
    LoraConfig(task_type="CAUSAL_LM", base_model_name_or_path=OPT).save_pretrained(folder / LORA)
    make_quotes(folder)
    (folder / IMAGE).parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / IMAGE)


def make_quotes(folder: Path) -> None:
    """Write a text data set, and a tokenizer for it next to the model that the tests with torch.compile train."""
    words = [f"word{i}" for i in range(100)]
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", *words, "</s>"])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=32
    ).save_pretrained(folder / OPT)
    quotes = np.random.default_rng(0).choice(words, size=(64, 8))
    rows = [{"quote": " ".join(quote), "author": "nobody", "tags": []} for quote in quotes]
    (folder / QUOTES).mkdir(parents=True, exist_ok=True)
    (folder / QUOTES / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    make_stand_ins(Path())
