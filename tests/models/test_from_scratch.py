"""Models and tokenizers built from a configuration, without any file or network."""

import numpy as np
import pytest
import torch
from PIL import Image
from testing import tiny_models
from testing.tiny_models import CAPTIONS, tiny_configs, tiny_inputs
from tokenizers import processors
from transformers import CLIPTokenizer

from hf_dissect.models.loading import (
    check_same_architecture,
    find_max_text_length,
    load_model_and_processor,
    logit_scale_and_bias,
)

CONFIGS = tiny_configs()


def from_scratch(model_type, **arguments):
    arguments = {"captions": CAPTIONS, "vocab_size": 600, "max_caption_length": 24, **arguments}
    return load_model_and_processor(config=CONFIGS[model_type], **arguments)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_a_model_from_scratch_trains_saves_and_loads(model_type, tmp_path):
    torch.manual_seed(0)
    model, processor = from_scratch(model_type)
    batch = tiny_inputs(model, processor, CAPTIONS[:4])
    assert batch["input_ids"].max() < model.config.text_config.vocab_size <= 600
    assert find_max_text_length(model, processor) == 24
    model.train()
    model(**batch, return_loss=True).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
    model.eval()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, loaded_processor = load_model_and_processor(name_or_path=str(tmp_path))
    assert find_max_text_length(loaded, loaded_processor) == 24
    again = tiny_inputs(loaded, loaded_processor, CAPTIONS[:4])
    assert batch.keys() == again.keys()
    assert all(torch.equal(batch[key], again[key]) for key in batch)
    with torch.no_grad():
        assert torch.equal(loaded(**again).logits_per_image, model(**batch).logits_per_image)
    check_same_architecture(model, tmp_path)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_the_same_captions_give_the_same_tokenizer_and_the_same_seed_the_same_weights(model_type):
    built = []
    for _ in range(4):
        torch.manual_seed(3)
        built.append(from_scratch(model_type, captions=iter(CAPTIONS)))
    first, first_processor = built[0]
    for model, processor in built[1:]:
        assert processor.tokenizer.get_vocab() == first_processor.tokenizer.get_vocab()
        assert processor.tokenizer(CAPTIONS).input_ids == first_processor.tokenizer(CAPTIONS).input_ids
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), first.parameters(), strict=True))


def test_clip_reads_the_embedding_at_the_first_end_token_whatever_the_caption_holds():
    model, processor = from_scratch("clip")
    tokenizer = processor.tokenizer
    assert type(tokenizer) is CLIPTokenizer
    text_config = model.config.text_config
    assert text_config.eos_token_id == tokenizer.eos_token_id == len(tokenizer) - 1
    assert text_config.bos_token_id == tokenizer.bos_token_id
    assert text_config.pad_token_id == tokenizer.pad_token_id
    captions = ["a red patch", "Ünseen wörds, 中文 and emoji 🦜!", "a red patch on the left " * 20]
    batch = tokenizer(captions, padding="longest", truncation=True, max_length=24, return_tensors="pt")
    lengths = batch["attention_mask"].sum(1)
    ends = (batch["input_ids"] == tokenizer.eos_token_id).int().argmax(1)
    assert torch.equal(ends, lengths - 1)
    with torch.no_grad():
        outputs = model.text_model(**batch)
    rows = torch.arange(3)
    torch.testing.assert_close(outputs.pooler_output, outputs.last_hidden_state[rows, lengths - 1])


def test_the_clip_tokenizer_lowers_cases_and_learns_whole_words():
    tokenizer = from_scratch("clip")[1].tokenizer
    assert tokenizer("A Red PATCH").input_ids == tokenizer("a red patch").input_ids
    assert tokenizer.tokenize("the patch") == ["the</w>", "patch</w>"]
    assert tokenizer.decode(tokenizer("a red patch").input_ids, skip_special_tokens=True) == "a red patch"


def test_siglip_starts_at_the_scale_and_bias_of_its_paper():
    scale, bias = logit_scale_and_bias(from_scratch("siglip")[0])
    assert scale.item() == pytest.approx(10.0)
    assert bias.item() == -10.0


def test_siglip_pads_to_the_full_length_without_a_mask_and_ends_the_caption():
    model, processor = from_scratch("siglip")
    batch = tiny_inputs(model, processor, ["a red patch"])
    ids = batch["input_ids"][0].tolist()
    text_config = model.config.text_config
    assert "attention_mask" not in batch and len(ids) == 24
    end = ids.index(text_config.eos_token_id)
    assert set(ids[end + 1 :]) == {text_config.pad_token_id}


def test_images_are_resized_whole_to_the_square_and_scaled_to_plus_minus_1():
    processor = from_scratch("clip")[1]
    exact = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    wide = Image.new("RGB", (96, 32), (255, 0, 0))
    values = processor.image_processor(images=[Image.fromarray(exact), wide], return_tensors="pt")["pixel_values"]
    assert values.shape == (2, 3, 32, 32) and values.dtype == torch.float32
    expected = torch.from_numpy(exact).permute(2, 0, 1).float() / 127.5 - 1
    torch.testing.assert_close(values[0], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(values[1].mean((1, 2)), torch.tensor([1.0, -1.0, -1.0]))


def test_a_clip_text_tower_in_a_dual_encoder_gets_clips_tokenizer():
    towers = {
        "vision_config": {**CONFIGS["clip"]["vision_config"], "model_type": "clip_vision_model"},
        "text_config": {**tiny_models.TRANSFORMER, "model_type": "clip_text_model"},
    }
    config = {"model_type": "vision-text-dual-encoder", "projection_dim": 16, **towers}
    model, processor = load_model_and_processor(config=config, captions=CAPTIONS, vocab_size=600)
    assert type(processor.tokenizer) is CLIPTokenizer
    assert model.config.text_config.eos_token_id == processor.tokenizer.eos_token_id
    assert find_max_text_length(model, processor) == 77


def test_a_roberta_text_tower_is_given_the_positions_it_skips():
    towers = {
        "vision_config": {**CONFIGS["clip"]["vision_config"], "model_type": "vit"},
        "text_config": {**tiny_models.TRANSFORMER, "model_type": "roberta"},
    }
    config = {"model_type": "vision-text-dual-encoder", "projection_dim": 16, **towers}
    arguments = {"captions": CAPTIONS, "vocab_size": 300, "max_caption_length": 12}
    model, processor = load_model_and_processor(config=config, **arguments)
    assert find_max_text_length(model, processor) == 12
    with torch.no_grad():
        model(**tiny_inputs(model, processor, ["red " * 50] * 4))


def test_a_given_tokenizer_is_used_and_its_end_token_is_what_clip_reads(tmp_path):
    tiny_models.bert_tokenizer().save_pretrained(tmp_path)
    model, processor = from_scratch("clip", tokenizer=str(tmp_path), captions=None)
    assert model.config.text_config.vocab_size == len(tiny_models.bert_tokenizer())
    assert model.config.text_config.eos_token_id == processor.tokenizer.sep_token_id
    batch = processor.tokenizer(["red left", "there is blue at the right"], padding=True, return_tensors="pt")
    with torch.no_grad():
        outputs = model.text_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    ends = batch["attention_mask"].sum(1) - 1
    torch.testing.assert_close(outputs.pooler_output, outputs.last_hidden_state[torch.arange(2), ends])


def test_a_tokenizer_that_clip_would_misread_is_refused(tmp_path):
    tokenizer = tiny_models.bert_tokenizer()
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(single="$A [CLS]", special_tokens=[("[CLS]", 2)])
    tokenizer.save_pretrained(tmp_path / "two")
    with pytest.raises(ValueError, match="ends captions with token 2"):
        from_scratch("clip", tokenizer=str(tmp_path / "two"))
    backend.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    tokenizer.save_pretrained(tmp_path / "none")
    with pytest.raises(ValueError, match="adds no end token"):
        from_scratch("clip", tokenizer=str(tmp_path / "none"))
