"""The shipped recipes of models of the Hub: their published values, and a step of each on tiny models and shards."""

import json

import pytest
import torch
from testing import tar_files, tiny_models

from hf_dissect.recipe import Recipe
from hf_dissect.runs.run import run_recipe

LOCAL = [
    "data.source=webdataset", "data.num_workers=0", "data.shuffle_buffer=16", "training.bf16=false",
    "training.use_cpu=true", "training.max_steps=3", "training.logging_steps=1", "training.report_to=none",
    "training.save_strategy=no", "training.warmup_steps=1", "training.per_device_train_batch_size=8",
    "model.max_caption_length=8", "model.check_reload=false",
]  # fmt: skip


def test_the_values_of_the_papers():
    acid, noisy = Recipe.load("siglip2-acid"), Recipe.load("clip-finetune-noisy")
    assert acid.training["max_steps"] == int(4e9 / 32_768)
    assert acid.training["per_device_train_batch_size"] * 64 == 2 * 32_768 and acid.selection.ratio == 0.5
    assert (acid.training["learning_rate"], acid.training["weight_decay"]) == (1e-5, 0.0)
    assert (acid.selection.strategy, acid.selection.options) == ("jest", {"chunks": 16})
    assert "so400m" in acid.selection.reference and "base" in acid.model.name_or_path
    assert noisy.training["max_steps"] == 118_851 // 256 * 5
    wanted = {
        "learning_rate": 5e-7,
        "adam_beta2": 0.98,
        "adam_epsilon": 1e-6,
        "weight_decay": 0.2,
        "warmup_steps": 500,
    }
    assert wanted.items() <= noisy.training.items()
    assert noisy.objective.noisy_channel is not None and noisy.training["average_weights"] == 0.75


@pytest.mark.parametrize("name", ["siglip2-acid", "clip-finetune-noisy"])
def test_a_few_steps_on_tiny_models(name, tmp_path):
    make = tiny_models.tiny_siglip if name == "siglip2-acid" else tiny_models.tiny_clip
    for folder, seed in (("learner", 0), ("teacher", 1)):
        model, processor = make(seed)
        model.save_pretrained(tmp_path / folder)
        processor.save_pretrained(tmp_path / folder)
    members = {}
    for number, row in enumerate(tiny_models.tiny_pairs(32)):
        # A PNG whatever its name.
        members |= {f"{number:03}.jpg": row["image"]["bytes"], f"{number:03}.txt": row["caption"].encode()}
    tar_files.write_tar(tmp_path / "shards" / "train-0.tar", members)
    overrides = [
        *LOCAL, f"model.name_or_path={tmp_path / 'learner'}", f"data.path={tmp_path / 'shards'}",
        f"training.output_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    if name == "siglip2-acid":
        overrides.append(f"selection.reference={tmp_path / 'teacher'}")
    else:
        overrides += ["data.validation_split=null", "evaluation.retrieval=false", "training.eval_strategy=no"]
    recipe = Recipe.load(name, overrides)
    before = torch.cat([weight.flatten() for weight in make(0)[0].parameters()])
    metrics = run_recipe(recipe)
    assert metrics["steps"] == 3 and metrics["selection"]["kept_share"] == (0.5 if name == "siglip2-acid" else 1.0)
    after = torch.cat(
        [weight.detach().flatten() for weight in type(make(0)[0]).from_pretrained(tmp_path / "run").parameters()]
    )
    assert not torch.equal(before, after) and (before - after).abs().max() < 1e-3  # at the recipe's learning rate
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["strategy"] == recipe.selection.strategy
