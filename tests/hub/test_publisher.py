"""What a Trainer with `push_to_hub` publishes while it trains and at its end, by each of its strategies."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load
from testing import tiny_models
from testing.hub_client import TOKEN
from testing.loopback_hub import Fault, LoopbackHub
from testing.tiny_recipe import tiny_recipe
from transformers import AutoModel, CLIPModel

from hf_dissect import DissectTrainer, DissectTrainingArguments, load_model_and_processor
from hf_dissect.hub.publisher import STAGING_PREFIX
from hf_dissect.hub.push import push_run
from hf_dissect.hub.repository import HubError
from hf_dissect.runs.run import build_trainer, run_recipe

MOLA = {"type": "mola", "variant": "router", "num_experts": 2, "r": 2, "target_modules": "all-linear"}
RUN_FILES = {"README.md", "config.json", "model.safetensors", "processor_config.json", "recipe.yaml"}
RUN_FILES |= {"tokenizer.json", "tokenizer_config.json", "metrics.json", "report.png"}
RUN_FILES |= {"modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"}


def pushing_recipe(folder: Path, **training):
    """The tiny recipe that pushes to ada/pushed, and saves at each of its two epochs."""
    settings = {"push_to_hub": True, "hub_model_id": "ada/pushed", "save_strategy": "epoch", **training}
    return tiny_recipe(folder, training=settings, evaluation={"noise_detection": False})


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
def test_strategies(hub: LoopbackHub, tmp_path, strategy):
    folder = tmp_path / "zaphod" / "run"
    run_recipe(pushing_recipe(folder, hub_strategy=strategy, hub_always_push=True, hub_token=None))
    pushed = hub.model("ada/pushed")
    checkpoints = {path.split("/")[0] for path in pushed.files if "/" in path}
    assert {path for path in pushed.files if "/" not in path} == RUN_FILES
    assert (
        checkpoints
        == {
            "end": set(),
            "every_save": set(),
            "checkpoint": {"last-checkpoint"},
            "all_checkpoints": {"checkpoint-4", "checkpoint-8"},
        }[strategy]
    )
    messages = [commit.message for commit in pushed.commits]
    assert messages[-1] == "End of training" and len(messages) == {"end": 1, "every_save": 3}.get(strategy, 5)
    assert not [path for path in pushed.files if path.endswith(".bin") or (path.count("/") and "README" in path)]
    for secret in (str(folder), str(tmp_path), "zaphod", TOKEN):
        # The state of an optimiser is zipped and holds none of our texts.
        assert not [path for path, content in pushed.files.items() if secret.encode() in content], secret
    assert not list(folder.glob(f"{STAGING_PREFIX}*"))


def test_each_save_publishes_the_model_of_its_step(hub: LoopbackHub, tmp_path):
    run_recipe(pushing_recipe(tmp_path / "run", hub_always_push=True))
    weights = [commit.files["model.safetensors"].content for commit in hub.model("ada/pushed").commits]
    saved = [(tmp_path / f"run/checkpoint-{step}/model.safetensors").read_bytes() for step in (4, 8)]
    assert weights[:2] == saved and weights[2] == saved[1] != saved[0]
    assert [commit.message for commit in hub.model("ada/pushed").commits[:2]] == [
        f"Training in progress, epoch {epoch}" for epoch in (1, 2)
    ]


def test_a_checkpoint_that_is_rotated_away_is_still_published(hub: LoopbackHub, tmp_path):
    hub.faults = [Fault("POST", "/preupload/", how=503)]  # holds up the first push by a second
    run_recipe(pushing_recipe(tmp_path / "run", hub_always_push=True, save_total_limit=1))
    assert not (tmp_path / "run/checkpoint-4").exists() and len(hub.model("ada/pushed").commits) == 3


def test_a_pushed_checkpoint_can_be_gone_on_from(hub: LoopbackHub, tmp_path, run):
    run_recipe(pushing_recipe(tmp_path / "run", hub_strategy="all_checkpoints", hub_always_push=True))
    for path, content in hub.model("ada/pushed").files.items():
        if path.startswith("checkpoint-4/"):
            (tmp_path / "again" / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "again" / path).write_bytes(content)
    run_recipe(tiny_recipe(tmp_path / "again", evaluation={"noise_detection": False}), resume=True)
    resumed, whole = (load((tmp_path / name / "model.safetensors").read_bytes()) for name in ("again", "run"))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_a_push_that_fails_on_the_way_ends_no_training(hub: LoopbackHub, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    hub.faults = [Fault("POST", "/commit/", times=3)]
    run_recipe(pushing_recipe(tmp_path / "run", hub_always_push=True))
    assert "checkpoint-4 was not pushed, and training continues" in caplog.text
    assert len(hub.model("ada/pushed").commits) == 2


def test_nobody_logged_in_is_told_before_the_training(hub, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="nobody is logged in"):
        build_trainer(pushing_recipe(tmp_path / "run"))


def test_a_plain_trainer_is_pushed_afterwards(hub: LoopbackHub, tmp_path):
    model, processor = tiny_models.tiny_clip()
    trainer = DissectTrainer(
        model=model,
        processing_class=processor,
        train_dataset=tiny_models.tiny_pairs(32),
        args=DissectTrainingArguments(
            str(tmp_path / "mine"), per_device_train_batch_size=16, max_steps=2, report_to="none", use_cpu=True
        ),
    )
    trainer.train()
    assert not hub.repositories
    done = trainer.push_to_hub("Done", private=True)
    assert (done.repo_id, hub.model("ada/mine").private) == ("ada/mine", True)
    assert hub.model("ada/mine").commits[-1].message == "Done"
    pushed = CLIPModel.from_pretrained("ada/mine")
    assert all(torch.equal(value, pushed.state_dict()[name]) for name, value in model.state_dict().items())
    branch = trainer.push_to_hub(revision="second", token=TOKEN, blocking=False)
    assert "model.safetensors" in branch.result(60).files and "second" in hub.model("ada/mine").branches


def test_an_adapter_is_loaded_from_the_hub_with_its_base(hub: LoopbackHub, tmp_path):
    recipe = pushing_recipe(tmp_path / "run", save_strategy="no")
    run_recipe(recipe.with_overrides([f"adapter={json.dumps(MOLA)}"]))
    files = hub.model("ada/pushed").files
    assert {"adapter_config.json", "adapter_model.safetensors", "base_model/model.safetensors"} <= files.keys()
    assert "model.safetensors" not in files
    base = AutoModel.from_pretrained("ada/pushed", subfolder="base_model", adapter_kwargs={"subfolder": "base_model"})
    pushed = PeftModel.from_pretrained(base, "ada/pushed").eval()
    local, processor = load_model_and_processor(name_or_path=str(tmp_path / "run"))
    batch = tiny_models.tiny_inputs(base, processor, tiny_models.CAPTIONS[:4])
    with torch.no_grad():
        assert torch.equal(pushed(**batch).logits_per_text, local(**batch).logits_per_text)


def test_an_adapter_of_a_local_base_does_not_name_its_folder(hub: LoopbackHub, tmp_path):
    for part in tiny_models.tiny_clip():
        part.save_pretrained(tmp_path / "zaphod" / "clip")
    model = {"name_or_path": str(tmp_path / "zaphod" / "clip"), "config": None}
    recipe = tiny_recipe(tmp_path / "run", model=model, evaluation={"noise_detection": False})
    run_recipe(recipe.with_overrides([f"adapter={json.dumps(MOLA)}"]))
    done = push_run(tmp_path / "run", "ada/adapter")
    assert "model.name_or_path" in done.left_out and "base_model_name_or_path of the adapter" in done.left_out
    files = hub.model("ada/adapter").files
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] is None
    assert not [name for name, content in files.items() if b"zaphod" in content]
    base = CLIPModel.from_pretrained(tmp_path / "zaphod" / "clip")
    assert type(PeftModel.from_pretrained(base, "ada/adapter")) is PeftModel


def test_a_push_that_fails_at_the_end_leaves_a_complete_run(hub: LoopbackHub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    hub.faults = [Fault("POST", "/commit/", times=100)]
    folder = tmp_path / "run"
    with pytest.raises(HubError, match=f"publish it later by: hf-dissect push {folder} ada/pushed"):
        run_recipe(pushing_recipe(folder, save_strategy="no"))
    hub.faults = []
    assert set(push_run(folder, "ada/pushed").files) == RUN_FILES
