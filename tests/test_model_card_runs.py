"""The card of real runs: current at each save and push, read back by the Hub's client, its snippet run as printed."""

import getpass
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from huggingface_hub import ModelCard
from PIL import Image
from testing import tiny_models
from testing.tiny_models import with_lora, with_mola
from testing.tiny_recipe import TOWER, tiny_recipe
from transformers import TrainerCallback

from hf_dissect import DissectTrainer, DissectTrainingArguments, TwinDualEncoder, make_scenes
from hf_dissect.data import shuffle_captions
from hf_dissect.runs.run import run_recipe

pytestmark = pytest.mark.usefixtures("drawn")
ROOT = Path(__file__).parents[1]
EPOCHS = {"save_strategy": "epoch", "eval_strategy": "epoch"}


def card_of(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


RUN_SNIPPETS = """
import json, os, sys

for folder, code, not_yet_imported in json.load(sys.stdin):
    os.chdir(folder)
    assert not_yet_imported not in sys.modules, not_yet_imported
    print(f"== {folder}", flush=True)
    exec(compile(code, folder, "exec"), {})
"""


def run_snippets(*snippets: tuple[Path, str]) -> dict[str, str]:
    """Folder -> what the snippet of its card prints, run there; beside it a module that none before it imports."""
    told = [(str(folder), _snippet(folder), module) for folder, module in snippets]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUN_SNIPPETS]
    done = subprocess.run(
        command, input=json.dumps(told), env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return dict(part.split("\n", 1) for part in done.stdout.split("== ")[1:])


def _snippet(folder: Path) -> str:
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text("utf-8"), re.DOTALL)[1]
    return code.replace("FOLDER_OF_THE_BASE_MODEL", str(folder.parent / "base"))


def assert_tells_nothing_of_this_machine(folder: Path) -> None:
    for path in folder.rglob("README.md"):
        text = path.read_text("utf-8")
        assert str(folder) not in text and "/tmp" not in text
        assert not re.search(rf"(?<!\w){re.escape(getpass.getuser())}(?!\w)", text)


class CardsSeen(TrainerCallback):
    """Reads the card at each save; added last, so that it comes after all others."""

    def __init__(self):
        self.texts: list[str] = []

    def on_save(self, args, state, control, **kwargs):
        self.texts.append(Path(args.output_dir, "README.md").read_text("utf-8"))


def trainer_of(folder: Path, model, processor, **settings) -> DissectTrainer:
    arguments = {
        "per_device_train_batch_size": 16,
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return DissectTrainer(
        model=model,
        processing_class=processor,
        train_dataset=with_tasks(shuffle_captions(tiny_models.tiny_pairs(32), rate=0.25)),
        eval_dataset=with_tasks(tiny_models.tiny_pairs(16, seed=1)),
        args=DissectTrainingArguments(str(folder), **arguments | settings),
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, dict]:
    """A finished run of a recipe: a CLIP from scratch on scenes, evaluated and saved each epoch."""
    folder = tmp_path_factory.mktemp("card") / "run"
    return folder, run_recipe(tiny_recipe(folder, training=EPOCHS))


def test_the_card_of_a_run_tells_what_the_run_found(run):
    folder, metrics = run
    card = card_of(folder)
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results == {
        key: value for key, value in metrics["final"].items() if key != "loss" and not key.startswith("noise")
    }
    assert card.data.library_name == "transformers" and card.data.license is None and card.data.datasets is None
    for part in (
        "# tiny\n",
        "A tiny CLIP on 64 drawn scenes.",
        "| Injected noise | 25% of the training captions shuffled, seed 0 |",
        "| Training pairs | 64 |",
        "| learning_rate | 0.001 |",
        f"| torch | {metrics['versions']['torch']} |",
        f"| Final scores: AUROC | {metrics['final']['noise_detection_auroc']:.3f} |",
        "](report.png)",
        "It was trained from scratch.",
    ):
        assert part in card.content
    assert "not finished" not in card.content
    assert_tells_nothing_of_this_machine(folder)


def test_the_picture_is_a_picture_of_the_run(run):
    with Image.open(run[0] / "report.png") as picture:
        picture.load()
        assert picture.format == "PNG" and picture.info.keys() <= {"dpi"}
        colors = {color for _, color in picture.convert("RGB").getcolors(1 << 20)}
    assert {(0, 114, 178), (213, 94, 0)} <= colors  # of the kept and of the dropped


def test_the_card_is_current_at_each_save(tmp_path):
    trainer = trainer_of(tmp_path / "run", *tiny_models.tiny_clip(), eval_strategy="steps", eval_steps=2)
    seen = CardsSeen()
    trainer.add_callback(seen)
    trainer.train()
    assert len(seen.texts) == 2
    for step, text in zip((2, 4), seen.texts, strict=True):
        assert f"this is step {step} of 4" in text and f"| Optimiser steps | {step} |" in text
        sums = [entry["eval_recall_sum"] for entry in trainer.state.log_history if "eval_recall_sum" in entry]
        found = {result.metric_type: result.metric_value for result in ModelCard(text).data.eval_results}
        assert found["recall_sum"] == sums[step // 2 - 1]
        assert "of the validation split" in text
    final = card_of(tmp_path / "run").content
    assert "not finished" not in final and "Optimiser steps | 4" in final


def test_a_card_that_cannot_be_written_does_not_end_the_training(tmp_path, caplog):
    trainer = trainer_of(tmp_path / "run", *tiny_models.tiny_clip(), save_run_folder=False)
    (tmp_path / "run" / "README.md").mkdir(parents=True)
    trainer.train()
    assert trainer.state.global_step == 4 and "model card could not be written" in caplog.text


def test_the_trainer_writes_no_card_of_its_own(tmp_path):
    trainer = trainer_of(tmp_path / "run", *tiny_models.tiny_clip())
    trainer.train()
    before = (tmp_path / "run" / "README.md").read_text("utf-8")
    (tmp_path / "run" / "README.md").write_text("of someone else")
    trainer.callback_handler.on_push_begin(trainer.args, trainer.state, trainer.control)  # a push begins with it
    assert (tmp_path / "run" / "README.md").read_text("utf-8") == before
    trainer.create_model_card(model_name="x", tags=["mine", *trainer.model.model_tags])  # as push_to_hub calls it
    after = (tmp_path / "run" / "README.md").read_text("utf-8")
    assert after.replace("- mine\n", "") == before
    trainer.create_model_card(license="mit", dataset_tags="me/pairs")
    data = card_of(tmp_path / "run").data
    assert data.license == "mit" and data.datasets == ["me/pairs"] and "mine" in data.tags
    trainer.hub_model_id = "me/x"  # what `init_hf_repo` does
    trainer.create_model_card()
    assert 'model_id = "me/x"' in card_of(tmp_path / "run").content and card_of(tmp_path / "run").data.license == "mit"


def with_tasks(pairs: Dataset) -> Dataset:
    return pairs.add_column("task", [index % 2 for index in range(len(pairs))])


def adapter_run(folder: Path, adapted, **settings) -> Path:
    """A run of an adapter on a base that was loaded from the folder beside it."""
    base, processor = tiny_models.tiny_clip()
    base.save_pretrained(folder.parent / "base")
    base.name_or_path = str(folder.parent / "base")
    trainer_of(folder, adapted(base), processor, **settings).train()
    return folder


def features_run(folder: Path) -> Path:
    """A run of a recipe on stored features."""
    data = folder.parent / "data"
    data.mkdir()
    sizes = {"train": 32, "validation": 16, "test": 16}
    for split, size in sizes.items():
        make_scenes(size, split=split).to_parquet(data / f"{split}.parquet")
    np.savez(data / "x.npz", **{split: np.random.default_rng(0).normal(size=(n, 12)) for split, n in sizes.items()})
    config = {
        "model_type": "vision-text-dual-encoder",
        "projection_dim": 16,
        "vision_config": {"model_type": "precomputed_features", "hidden_size": 12},
        "text_config": {"model_type": "clip_text_model", **TOWER, "max_position_embeddings": 16},
    }
    scenes = dict.fromkeys(["scenes_train", "scenes_validation", "scenes_test"])
    section = {**scenes, "source": "folder", "path": str(data), "image_features": "x.npz"}
    run_recipe(tiny_recipe(folder, model={"config": config}, data=section))
    return folder


@pytest.mark.slow
def test_the_snippets_run_as_printed(run, tmp_path):
    """Train eight models and start a process for what their cards say."""
    folders = {"clip": run[0]}
    for name in ("tiny_dual_encoder", "tiny_siglip"):
        folders[name] = tmp_path / name
        trainer_of(folders[name], *getattr(tiny_models, name)(), save_strategy="no").train()
    folders["lora"] = adapter_run(tmp_path / "lora", with_lora, save_strategy="no")
    (tmp_path / "grad").mkdir()
    grad = partial(with_mola, variant="grad", num_experts=2)
    folders["grad"] = adapter_run(tmp_path / "grad" / "run", grad, save_strategy="no", task_column="task")
    model, processor = tiny_models.tiny_clip()
    folders["router"] = tmp_path / "router"
    trainer_of(folders["router"], with_mola(model), processor, save_strategy="no").train()
    folders["features"] = features_run(tmp_path / "features")
    folders["twins"], gsc = tmp_path / "twins", {"dual": True, "warmup_epochs": 0}
    twins = TwinDualEncoder.of(tiny_models.tiny_clip(seed=1)[0], tiny_models.tiny_clip(seed=2)[0])
    trainer_of(folders["twins"], twins, processor, save_strategy="no", gsc=gsc).train()
    not_needed = dict.fromkeys(folders, "hf_dissect") | {
        "router": "none",
        "features": "hf_dissect.models.feature_encoder",
    }
    not_needed["twins"] = "hf_dissect.models.twin_encoder"
    printed = run_snippets(*((folder, not_needed[name]) for name, folder in folders.items()))
    assert len(printed) == len(folders) and all("tensor([[" in text for text in printed.values())
    contents = {name: card_of(folder) for name, folder in folders.items()}
    assert "sigmoid" in contents["tiny_siglip"].content and "softmax" in contents["tiny_dual_encoder"].content
    assert contents["features"].data.pipeline_tag == "feature-extraction"
    assert "| Images | stored features |" in contents["features"].content
    assert "set_task(0)" in contents["grad"].content and "base_model" in contents["router"].content
    for folder in folders.values():
        assert_tells_nothing_of_this_machine(folder)


def test_peft_puts_no_card_of_its_own_beside_an_adapter(tmp_path):
    adapter_run(tmp_path / "run", with_lora)
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-2"):
        card = card_of(folder)
        assert card.data.library_name == "peft" and card.data.base_model is None and "lora" in card.data.tags
        assert "started from a local model" in card.content and "Model Card for" not in card.content
    assert_tells_nothing_of_this_machine(tmp_path / "run")
