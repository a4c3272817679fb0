"""Attention of the towers: SDPA where transformers has it, and a warning where it does not."""

import logging

import pytest
import torch
from testing import tiny_models
from testing.trained_towers import save_text_tower, save_vision_tower

from hf_dissect import DissectTrainer, DissectTrainingArguments
from hf_dissect.models.attention import list_attention, warn_of_eager_attention
from hf_dissect.models.loading import load_model_and_processor

BOTH = {"vision_model": "sdpa", "text_model": "sdpa"}
FAMILIES = {family: BOTH for family in tiny_models.FAMILIES} | {"tiny_align": {"text_model": "eager"}}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    model = getattr(tiny_models, family)()[0]
    assert list_attention(model) == FAMILIES[family]
    wrapped = {f"module.{name}": kind for name, kind in FAMILIES[family].items()}
    assert list_attention(tiny_models.Wrapper(model)) == wrapped


@pytest.mark.parametrize("model_type", tiny_models.tiny_configs())
def test_models_from_scratch(model_type):
    config = tiny_models.tiny_configs()[model_type]
    model, _ = load_model_and_processor(config=config, captions=tiny_models.CAPTIONS, vocab_size=600)
    assert set(list_attention(model).values()) == ({"eager"} if model_type == "align" else {"sdpa"})


@pytest.mark.parametrize(
    ("vision", "text", "attention"),
    [
        ("vit", "bert", BOTH),
        ("dinov2", "gpt2", {"vision_model.encoder": "sdpa", "text_model": "sdpa"}),
        ("resnet", "mpnet", {"text_model": "eager"}),
        ("convnext", "distilbert", {"text_model": "sdpa"}),
    ],
)
def test_two_trained_towers(vision, text, attention, tmp_path):
    towers = {
        "vision": {"name_or_path": save_vision_tower(tmp_path / "v", vision)},
        "text": {"name_or_path": save_text_tower(tmp_path / "t", text)},
    }
    assert list_attention(load_model_and_processor(**towers, projection_dim=8)[0]) == attention


def test_eager_attention_is_reported_with_the_way_out(caplog):
    with caplog.at_level(logging.WARNING):
        warn_of_eager_attention(tiny_models.tiny_clip()[0])
        assert not caplog.records
        warn_of_eager_attention(tiny_models.tiny_align()[0])
        model = tiny_models.tiny_clip()[0]
        model.set_attn_implementation({"text_config": "eager"})
        warn_of_eager_attention(model)
    no_other, chosen = (record.getMessage() for record in caplog.records)
    assert (
        no_other.startswith("text_model (AlignTextModel) computes attention in eager mode") and "no other" in no_other
    )
    assert chosen.startswith("text_model (CLIPTextModel)") and 'attn_implementation="sdpa"' in chosen


@pytest.mark.parametrize("family", ["tiny_clip", "tiny_siglip", "tiny_dual_encoder"])
def test_bf16_runs_on_sdpa_in_step_and_scoring(family, tmp_path, monkeypatch):
    model, processor = getattr(tiny_models, family)()
    original, seen = torch.nn.functional.scaled_dot_product_attention, set()

    def attend(query, *args, **settings):
        seen.add((torch.is_grad_enabled(), query.dtype))
        return original(query, *args, **settings)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    settings = dict(per_device_train_batch_size=8, max_steps=2, bf16=True, save_run_folder=False, check_reload=False)
    args = DissectTrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", selection_strategy="small_loss", save_strategy="no", **settings
    )
    rows = tiny_models.tiny_pairs(16)
    DissectTrainer(model=model, args=args, train_dataset=rows, processing_class=processor).train()
    assert seen == {(True, torch.bfloat16), (False, torch.bfloat16)}
