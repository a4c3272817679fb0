"""Statistics of what does not train stay in whole runs, and what is saved gives the embeddings of what was trained."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from testing import tiny_models
from testing.tiny_models import tiny_inputs, tiny_pairs, with_mola

from hf_dissect import DissectTrainer, DissectTrainingArguments, load_model_and_processor
from hf_dissect.models.families import freeze_tower

CONVOLUTIONS = r".*\.(convolution|expand_conv|query)"
FAMILIES = ["tiny_align", "tiny_efficientnet_dual_encoder"]
SETTINGS = dict(
    per_device_train_batch_size=16,
    learning_rate=1e-2,
    max_steps=4,
    selection_strategy="none",
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
    use_cpu=True,
)


def lora(model, targets, **fields):
    return get_peft_model(model, LoraConfig(r=2, target_modules=targets, **fields))


def freeze_norms(model, targets):
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d) and "blocks.1" in name:
            module.requires_grad_(False)
    return model


def freeze_images(model, targets):
    freeze_tower(model, "vision")
    return model


CHANGES = {
    "lora": lora,
    "lora with biases": lambda model, targets: lora(model, targets, bias="all"),
    "lora on texts": lambda model, targets: lora(model, ["query"], modules_to_save=["visual_projection"]),
    "mola grad": lambda model, targets: with_mola(model, "grad", target_modules=targets, default_task=0),
    "mola router": lambda model, targets: with_mola(model, "router", target_modules=targets),
    "freeze": freeze_images,
    "norms frozen by hand": freeze_norms,
}


def train(model, processor, folder, **settings):
    trainer = DissectTrainer(
        model=model,
        processing_class=processor,
        train_dataset=tiny_pairs(64),
        args=DissectTrainingArguments(str(folder), **{**SETTINGS, **settings}),
    )
    trainer.train()
    return trainer.model


def embed(model, inputs):
    with torch.no_grad():
        output = model.eval()(**{name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")})
    return torch.cat([output.image_embeds, output.text_embeds])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("change", list(CHANGES))
def test_a_reloaded_run_gives_the_same_embeddings(family, change, tmp_path):
    model, processor = getattr(tiny_models, family)()
    inputs = tiny_inputs(model, processor, tiny_models.CAPTIONS[:4])
    model = CHANGES[change](model, CONVOLUTIONS)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    frozen = {
        name
        for module_name, module in model.named_modules()
        for name in (f"{module_name}.{buffer}" for buffer, _ in module.named_buffers(recurse=False))
        if not all(weight.requires_grad for weight in module.parameters(recurse=False))
    }
    model = train(model, processor, tmp_path / "run")
    assert {name for name in frozen if "running" in name}
    after = dict(model.named_buffers())
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    if change == "norms frozen by hand":
        assert any(not torch.equal(before[name], after[name]) for name in before if "running" in name)
    loaded, _ = load_model_and_processor(name_or_path=str(tmp_path / "run"))
    assert torch.equal(embed(loaded, inputs), embed(model, inputs))


@pytest.mark.parametrize(
    "settings",
    [
        {"grad_cache_chunk_size": 4},
        {"gradient_checkpointing": True},
        {"gradient_accumulation_steps": 2, "max_steps": 2},
        {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 2},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_statistics_stay_however_a_step_is_made(settings, tmp_path):
    family = "tiny_align" if "gradient_checkpointing" in settings else "tiny_efficientnet_dual_encoder"
    model, processor = getattr(tiny_models, family)()
    model = lora(model, CONVOLUTIONS)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model = train(model, processor, tmp_path / "run", save_run_folder=False, **settings)
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())


def test_statistics_of_a_model_that_trains_as_a_whole_move_as_ever(tmp_path):
    model, processor = tiny_models.tiny_efficientnet_dual_encoder()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model = train(model, processor, tmp_path / "run", save_run_folder=False)
    running = [name for name in before if "running" in name]
    assert running and not any(torch.equal(before[name], dict(model.named_buffers())[name]) for name in running)


def test_dropout_of_a_frozen_base_stays_on(tmp_path):
    model, processor = tiny_models.tiny_efficientnet_dual_encoder()
    model = train(lora(model, ["query"]), processor, tmp_path / "run", save_run_folder=False)
    inputs = tiny_inputs(model, processor, tiny_models.CAPTIONS[:4])
    model.train()
    first, second = (model(**inputs).text_embeds for _ in range(2))
    assert not torch.equal(first, second)
