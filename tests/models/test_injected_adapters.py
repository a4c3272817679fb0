"""Adapters that `add_adapter` of transformers puts into a model count as adapters wherever those of PEFT do."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from testing import tiny_models
from testing.tiny_models import tiny_inputs, tiny_pairs

from hf_dissect import DissectTrainer, DissectTrainingArguments, MolaConfig, load_model_and_processor
from hf_dissect.models.adapters import add_adapter, describe_adapter, find_base
from hf_dissect.runs.evaluate import evaluate_checkpoint

MOLA = {"num_experts": 2, "r": 2, "target_modules": ["q_proj", "fc1"]}
CONFIGS = {
    "lora": lambda: LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["visual_projection"]),
    "mola grad": lambda: MolaConfig(variant="grad", default_task=1, **MOLA),
    "mola router": lambda: MolaConfig(variant="router", train_base="all", router_image_size=16, **MOLA),
}
SETTINGS = dict(
    per_device_train_batch_size=16,
    learning_rate=1e-2,
    num_train_epochs=2,
    selection_strategy="none",
    save_strategy="steps",
    save_steps=4,
    logging_steps=4,
    report_to="none",
    disable_tqdm=True,
    use_cpu=True,
)


def make_trainer(folder, config, base=None, name=None, **settings):
    if base is None:
        model, processor = tiny_models.tiny_clip()
    else:
        model, processor = load_model_and_processor(name_or_path=str(base))
    torch.manual_seed(1)
    model.add_adapter(CONFIGS[config](), adapter_name=name)
    return DissectTrainer(
        model=model,
        processing_class=processor,
        train_dataset=tiny_pairs(64),
        eval_dataset=tiny_pairs(16, seed=1),
        args=DissectTrainingArguments(str(folder), **{**SETTINGS, **settings}),
    )


@pytest.fixture(scope="module", params=list(CONFIGS))
def run(request, tmp_path_factory):
    """The name of the adapter's kind, the folder of a finished run, and its trainer."""
    folder = tmp_path_factory.mktemp("injected") / "run"
    trainer = make_trainer(folder, request.param)
    trainer.train()
    return request.param, folder, trainer


def embeddings(model, processor):
    inputs = tiny_inputs(model, processor, tiny_models.CAPTIONS[:4])
    with torch.no_grad():
        output = model.eval()(**inputs)
    return torch.cat([output.image_embeds, output.text_embeds])


def test_the_run_folder_is_that_of_an_adapter(run):
    config, folder, trainer = run
    for place in (folder, folder / "checkpoint-4", folder / "checkpoint-8"):
        assert {path.name for path in (place / "base_model").iterdir()} == {"config.json", "model.safetensors"}
        assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in place.iterdir()}
        assert not (place / "config.json").exists() and not (place / "model.safetensors").exists()
    adapter = json.loads((folder / "metrics.json").read_text())["adapter"]
    assert adapter["type"] == config.partition(" ")[0]
    trained = [part for part in trainer.model.parameters() if part.requires_grad]
    assert adapter["trained_parameters"] == sum(part.numel() for part in trained) > 0
    card = (folder / "README.md").read_text()
    assert "library_name: peft" in card and "| Trained parameters |" in card and "PeftModel.from_pretrained(" in card


def test_the_run_folder_loads_and_is_evaluated(run, tmp_path):
    _, folder, trainer = run
    shutil.copytree(folder, tmp_path / "elsewhere")
    model, processor = load_model_and_processor(name_or_path=str(tmp_path / "elsewhere"))
    assert isinstance(model, PeftModel)
    assert torch.equal(embeddings(model, processor), embeddings(trainer.model, processor))
    tiny_pairs(16, seed=1).to_parquet(tmp_path / "pairs.parquet")
    figures = evaluate_checkpoint(str(folder), data=str(tmp_path / "pairs.parquet"))
    expected = json.loads((folder / "metrics.json").read_text())["final"]
    assert figures["recall_sum"] == pytest.approx(expected["recall_sum"])


@pytest.mark.parametrize("name", [None, "mine"])
def test_an_interrupted_run_ends_as_the_whole_one(run, name, tmp_path):
    config, folder, _ = run
    shutil.copytree(folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-8")
    make_trainer(tmp_path / "run", config, name=name).train(resume_from_checkpoint=True)
    whole, part = (load_file(place / "adapter_model.safetensors") for place in (folder, tmp_path / "run"))
    assert whole.keys() == part.keys() and all(torch.equal(whole[key], part[key]) for key in whole)


def test_a_checkpoint_of_another_adapter_is_refused_and_the_best_one_is_loaded(run, tmp_path):
    config, folder, _ = run
    other = next(name for name in CONFIGS if name != config)
    with pytest.raises(ValueError, match="holds an adapter of"):
        make_trainer(tmp_path / "other", other).train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    settings = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "eval_strategy": "steps"}
    trainer = make_trainer(tmp_path / "best", config, eval_steps=4, learning_rate=0.5, **settings)
    trainer.train()
    best = load_file(f"{trainer.state.best_model_checkpoint}/adapter_model.safetensors")
    saved = load_file(tmp_path / "best" / "adapter_model.safetensors")
    assert all(torch.equal(best[key], saved[key]) for key in saved)


def test_a_base_with_a_name_is_named_and_not_saved(tmp_path):
    model, processor = tiny_models.tiny_clip()
    for part in (model, processor):
        part.save_pretrained(tmp_path / "base")
    trainer = make_trainer(tmp_path / "run", "lora", base=tmp_path / "base", save_strategy="no")
    trainer.train()
    assert find_base(trainer.model) == str(tmp_path / "base") and not (tmp_path / "run" / "base_model").exists()
    loaded, _ = load_model_and_processor(name_or_path=str(tmp_path / "run"))
    assert torch.equal(embeddings(loaded, processor), embeddings(trainer.model, processor))


def test_a_second_adapter_by_a_recipe_is_refused():
    model, _ = tiny_models.tiny_clip()
    model.add_adapter(CONFIGS["lora"](), adapter_name="mine")
    assert describe_adapter(model)["type"] == "lora"
    with pytest.raises(ValueError, match="holds an adapter already"):
        add_adapter(model, {"type": "lora"})
