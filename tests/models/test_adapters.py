"""Adapters of any PEFT type: made from a recipe, trained, saved with their base, loaded, evaluated and resumed."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from testing import tiny_models
from testing.tiny_models import Wrapper, tiny_inputs, with_lora, with_mola
from testing.tiny_recipe import tiny_recipe
from transformers import AutoModel

from hf_dissect import DissectTrainer, DissectTrainingArguments, load_model_and_processor, make_scenes
from hf_dissect.cli import main
from hf_dissect.models.adapters import (
    add_adapter,
    check_same_adapter,
    describe_adapter,
    find_base,
    restore_base,
    save_base,
)
from hf_dissect.models.loading import check_same_architecture
from hf_dissect.mola import mola_routing
from hf_dissect.runs.evaluate import evaluate_checkpoint
from hf_dissect.runs.run import build_trainer, run_recipe

TASKS = {"scenes_tasks": 2, "task_column": "task"}
LORA = {"type": "lora", "r": 2, "target_modules": "all-linear"}
GRAD = {"type": "mola", "variant": "grad", "num_experts": 2, "r": 2}
ROUTER = {"type": "mola", "num_experts": 2, "r": 2, "train_base": "all", "router_image_size": 16}
ADAPTERS = {"lora": LORA, "grad": GRAD, "router": ROUTER}


def adapted_recipe(folder, adapter, **sections):
    data = {**TASKS, "noise_rate": None, **sections.pop("data", {})}
    training = {"save_strategy": "steps", "save_steps": 4, "learning_rate": 1e-2, **sections.pop("training", {})}
    recipe = tiny_recipe(folder, data=data, training=training, **sections).to_dict()
    return tiny_recipe(folder).from_dict(recipe | {"adapter": adapter})


@pytest.fixture(scope="module", params=list(ADAPTERS))
def run(request, tmp_path_factory):
    """The folder of a finished run, its recipe and its metrics."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    recipe = adapted_recipe(folder, ADAPTERS[request.param])
    return folder, recipe, run_recipe(recipe)


def test_the_run_folder_holds_the_adapter_and_its_base(run):
    folder, recipe, metrics = run
    for place in (folder, folder / "checkpoint-4", folder / "checkpoint-8"):
        assert {path.name for path in (place / "base_model").iterdir()} == {"config.json", "model.safetensors"}
        assert {"adapter_config.json", "adapter_model.safetensors", "recipe.yaml"} <= {p.name for p in place.iterdir()}
        assert not (place / "config.json").exists() and not (place / "model.safetensors").exists()
    assert metrics["adapter"]["type"] == recipe.adapter["type"]
    assert metrics["adapter"]["settings"]["r"] == 2 and metrics["adapter"]["trained_parameters"] > 0
    assert json.loads((folder / "metrics.json").read_text())["adapter"] == metrics["adapter"]


def test_the_saved_adapter_gives_the_figures_of_the_end(run):
    folder, _, metrics = run
    for place in (folder, folder / "checkpoint-8"):
        figures = evaluate_checkpoint(str(place), batch_size=24)
        assert figures == pytest.approx({key: metrics["final"][key] for key in figures}, abs=1e-5)
    assert evaluate_checkpoint(str(folder / "checkpoint-4"), batch_size=24)["loss"] != metrics["final"]["loss"]


def test_an_interrupted_run_ends_as_the_whole_one(run, tmp_path):
    folder, recipe, _ = run
    shutil.copytree(folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-8")
    resumed = adapted_recipe(tmp_path / "run", recipe.adapter)
    run_recipe(resumed, resume=True)
    whole, part = (load_file(place / "adapter_model.safetensors") for place in (folder, tmp_path / "run"))
    assert whole.keys() == part.keys() and all(torch.equal(whole[name], part[name]) for name in whole)


def test_a_run_can_be_moved_and_loaded_as_its_card_says(run, tmp_path):
    folder, recipe, _ = run
    shutil.copytree(folder, tmp_path / "elsewhere")
    model, processor = load_model_and_processor(name_or_path=str(tmp_path / "elsewhere"))
    assert isinstance(model, PeftModel) and not model.training and model.get_base_model().name_or_path == ""
    place = {"subfolder": "base_model", "adapter_kwargs": {"subfolder": "base_model"}}  # as the card does
    base = AutoModel.from_pretrained(tmp_path / "elsewhere", **place)
    by_hand = PeftModel.from_pretrained(base, tmp_path / "elsewhere").eval()
    inputs = {**processor(text=["a red circle", "a cross"], padding=True, return_tensors="pt")}
    inputs["pixel_values"] = torch.rand(2, 3, 32, 32, generator=torch.manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits_per_image, by_hand(**inputs).logits_per_image)
    trained = {name for name, part in model.named_parameters() if part.requires_grad}
    start = {name for name, part in build_trainer(recipe).model.named_parameters() if part.requires_grad}
    assert trained == start  # what was trained is trained on


def test_the_card_is_written_last_and_says_how_to_load(run):
    folder, recipe, _ = run
    card = (folder / "README.md").read_text()
    is_mola = recipe.adapter["type"] == "mola"
    assert card.startswith("---\nlibrary_name: peft\n") and "sample-selection" in card
    assert f"- {recipe.adapter['type']}\n" in card and '{"subfolder": "base_model"}' in card
    assert "PeftModel.from_pretrained(base" in card and "| Adapter: r | 2 |" in card
    assert ("import hf_dissect" in card) == is_mola == ("2406.09679" in card) == ("2402.08562" in card)
    assert ("| Adapter: variant | grad |" in card) == ("model.set_task(0)" in card)
    shutil.copytree(folder, folder.parent / "saved again")
    build_trainer(recipe).model.save_pretrained(folder.parent / "saved again")
    again = (folder.parent / "saved again" / "README.md").read_text()  # PEFT writes the tags anew at each save
    assert "\n- sample-selection\n" in again and card.partition("\n# ")[2].strip() in again


def test_the_command_evaluates_an_adapter_on_data_with_tasks(run, tmp_path, capsys):
    make_scenes(24, tasks=2, split="test").to_parquet(tmp_path / "x.parquet")
    figures = {}
    for given in ([], ["--task-column", "task"]):
        output = tmp_path / "figures.json"
        command = ["evaluate", str(run[0]), "--data", str(tmp_path / "x.parquet"), "--output", str(output), *given]
        assert main(command) == 0
        figures[bool(given)] = json.loads(output.read_text())
    assert "recall sum" in capsys.readouterr().out
    by_task = run[1].adapter.get("variant") == "grad"
    assert (figures[True]["loss"] != figures[False]["loss"]) == by_task
    # The run's own data have the column.
    assert figures[True]["loss"] == pytest.approx(run[2]["final"]["loss"], abs=1e-5)


def test_zero_shot_figures_of_an_adapter(run):
    from hf_dissect.data import make_scene_classes

    rows = make_scene_classes(12)
    rows.to_parquet(run[0].parent / "labelled.parquet")
    figures = evaluate_checkpoint(str(run[0]), data=str(run[0].parent / "labelled.parquet"))
    assert figures["zero_shot_num_images"] == 12


def test_the_best_checkpoint_is_what_is_saved(tmp_path):
    training = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "eval_strategy": "steps"}
    recipe = adapted_recipe(
        tmp_path / "run",
        ROUTER,
        training={**training, "eval_steps": 4, "learning_rate": 1.0, "lr_scheduler_type": "constant"},
    )
    run_recipe(recipe)
    saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    state = json.loads((tmp_path / "run" / "checkpoint-8" / "trainer_state.json").read_text())
    number = state["best_model_checkpoint"].rpartition("-")[2]
    best = load_file(tmp_path / "run" / f"checkpoint-{number}" / "adapter_model.safetensors")
    assert all(torch.equal(best[name], saved[name]) for name in saved)


def test_an_adapter_on_a_saved_model_names_it(tmp_path):
    run_recipe(tiny_recipe(tmp_path / "base", training={"num_train_epochs": 1}, selection={"strategy": "none"}))
    model = {"config": None, "vocab_size": None, "name_or_path": str(tmp_path / "base")}
    recipe = adapted_recipe(tmp_path / "run", GRAD | {"train_logit_scale": True}, model=model)
    metrics = run_recipe(recipe)
    assert not (tmp_path / "run" / "base_model").exists()
    settings = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tmp_path / "base")
    assert evaluate_checkpoint(str(tmp_path / "run"))["loss"] == pytest.approx(metrics["final"]["loss"], abs=1e-5)
    card = (tmp_path / "run" / "README.md").read_text()
    assert "started from a local model" in card and "FOLDER_OF_THE_BASE_MODEL" in card and str(tmp_path) not in card
    # An adapter is trained on when it is named as the model, and not covered by a second one.
    again = tiny_recipe(tmp_path / "again", model=model | {"name_or_path": str(tmp_path / "run")}, data=TASKS)
    first = load_file(tmp_path / "run" / "adapter_model.safetensors")
    run_recipe(again)
    second = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert first.keys() == second.keys() and any(not torch.equal(first[name], second[name]) for name in first)
    twice = adapted_recipe(tmp_path / "twice", LORA, model=again.to_dict()["model"])
    with pytest.raises(ValueError, match="adapter: model.name_or_path holds an adapter already"):
        build_trainer(twice)
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(OSError, match="the base model .*base' of the adapter cannot be loaded"):
        load_model_and_processor(name_or_path=str(tmp_path / "run"))


def test_an_adapter_saved_without_a_processor_takes_that_of_its_base(tiny_clip, tmp_path):
    model, processor = tiny_clip
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    base, _ = load_model_and_processor(name_or_path=str(tmp_path / "base"))
    with_lora(base).save_pretrained(tmp_path / "adapter")
    loaded, found = load_model_and_processor(name_or_path=str(tmp_path / "adapter"))
    assert found.tokenizer("red")["input_ids"] == processor.tokenizer("red")["input_ids"]
    assert find_base(Wrapper(loaded)) == str(tmp_path / "base")


@pytest.mark.parametrize("family", ["tiny_clip", "tiny_siglip", "tiny_dual_encoder", "tiny_align"])
def test_the_base_is_saved_and_restored_as_it_is(family, tmp_path):
    model, processor = getattr(tiny_models, family)()
    inputs = tiny_inputs(model, processor, tiny_models.CAPTIONS[:4])
    expected = model(**inputs).logits_per_image
    adapted = Wrapper(
        get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", modules_to_save=["visual_projection"]))
    )
    save_base(adapted, tmp_path)
    assert torch.equal(AutoModel.from_pretrained(tmp_path / "base_model")(**inputs).logits_per_image, expected)
    other, _ = getattr(tiny_models, family)(seed=1)
    other = with_lora(other).eval()
    assert not torch.allclose(other(**inputs).logits_per_image, expected)
    restore_base(other, tmp_path)
    assert torch.equal(other(**inputs).logits_per_image, expected)
    restore_base(other, tmp_path / "nothing")
    save_base(model, tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_a_checkpoint_of_another_adapter_is_refused(tiny_clip, tmp_path):
    model, _ = tiny_clip
    model.save_pretrained(tmp_path / "whole")
    adapted = with_lora(model)
    adapted.save_pretrained(tmp_path / "lora")
    check_same_architecture(Wrapper(adapted), tmp_path / "lora")
    plain, _ = tiny_models.tiny_clip()
    with pytest.raises(ValueError, match="holds an adapter, but the model to be trained has none"):
        check_same_architecture(plain, tmp_path / "lora")
    with pytest.raises(ValueError, match="is of another model"):
        check_same_architecture(adapted, tmp_path / "whole")
    mola = with_mola(plain)
    with pytest.raises(ValueError, match="holds an adapter of type LORA, but .* is of type MOLA"):
        check_same_architecture(mola, tmp_path / "lora")
    mola.save_pretrained(tmp_path / "mola")
    check_same_adapter(mola, tmp_path / "mola")
    wider = with_mola(tiny_models.tiny_clip()[0], num_experts=3)
    with pytest.raises(ValueError, match=r"holds an adapter of another shape than .*first base_model.*\[[23][\], ]"):
        check_same_architecture(wider, tmp_path / "mola")
    weights = tmp_path / "mola" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(OSError, match="cannot be read"):
        check_same_architecture(mola, tmp_path / "mola")


@pytest.mark.parametrize("tower", ["vision", "text"])
@pytest.mark.parametrize("given", [None, ".*fc1", ["fc1", "fc2"]])
def test_a_frozen_tower_gets_no_adapter_and_is_not_trained(tower, given, tiny_clip):
    settings = {"type": "mola", "r": 2, "target_modules": "all-linear", "train_base": "all", "exclude_modules": given}
    adapted = add_adapter(tiny_clip[0], settings, tower)
    other = {"vision": "text", "text": "vision"}[tower]
    names = [name for name, part in adapted.named_parameters() if f"{tower}_model" in name]
    assert names and not any("mola_" in name or adapted.get_parameter(name).requires_grad for name in names)
    places = {name.rpartition(".mola_A")[0] for name, _ in adapted.named_parameters() if ".mola_A" in name}
    assert any(f"{other}_model" in place for place in places)
    assert any(place.endswith("fc1") for place in places) == (given is None)
    assert any(part.requires_grad for name, part in adapted.named_parameters() if f"{other}_model" in name)


def test_an_adapter_that_does_not_fit_names_the_section(tiny_clip):
    with pytest.raises(ValueError, match="adapter: .*nowhere"):
        add_adapter(tiny_clip[0], {"type": "lora", "target_modules": ["nowhere"]})
    with pytest.raises(ValueError, match="adapter: .*target_modules"):
        add_adapter(tiny_models.tiny_clip()[0], {"type": "lora"})


def test_a_model_without_adapter_is_described_as_none(tiny_clip):
    assert describe_adapter(tiny_clip[0]) is None and find_base(tiny_clip[0]) is None
    described = describe_adapter(Wrapper(with_mola(tiny_clip[0])))
    assert described["settings"]["variant"] == "router" and described["settings"]["num_experts"] == 2
    assert described["settings"]["target_modules"] == ["fc1", "q_proj", "query"]
    json.dumps(described)


def test_names_of_tasks_are_kept_with_the_run(tmp_path):
    rows = tiny_models.tiny_pairs(32)
    named = rows.add_column("task", [("art", "photo")[row % 2] for row in range(32)])
    model, processor = tiny_models.tiny_clip()
    trainer = DissectTrainer(
        model=with_mola(model, "grad", init_weights=False),
        processing_class=processor,
        train_dataset=named,
        args=DissectTrainingArguments(
            str(tmp_path / "run"),
            task_column="task",
            per_device_train_batch_size=16,
            max_steps=2,
            report_to="none",
            selection_strategy="none",
            disable_tqdm=True,
            per_device_eval_batch_size=64,
        ),
    )
    trainer.train()
    assert json.loads((tmp_path / "run" / "tasks.json").read_text()) == ["art", "photo"]
    photos = named.filter(lambda row: row["task"] == "photo")
    photos.to_parquet(tmp_path / "photos.parquet")
    found = evaluate_checkpoint(str(tmp_path / "run"), data=str(tmp_path / "photos.parquet"), task_column="task")
    mola_routing(trainer.model).fixed_task["default"] = 1
    trainer.args.task_column = None
    expected = trainer.evaluate(photos.remove_columns("task"))
    assert found["loss"] == pytest.approx(expected["eval_loss"], abs=1e-5)
