"""A recipe of the Hub repeats its run, writes below runs/ only, and brings no code, push, path or token along."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from testing.hub_client import TOKEN
from testing.loopback_hub import LoopbackHub
from testing.tiny_recipe import tiny_settings

from hf_dissect.cli import main
from hf_dissect.hub import pull
from hf_dissect.hub.address import HubAddress
from hf_dissect.hub.pull import download_model
from hf_dissect.hub.push import push_run
from hf_dissect.hub.repository import HubError
from hf_dissect.hub.shared_recipe import select_shareable
from hf_dissect.recipe.recipe import Recipe, RecipeError

EVE = HubAddress("eve/recipe")

pull_recipe = partial(pull.pull_recipe, kind=Recipe)


def publish(hub: LoopbackHub, **sections) -> HubAddress:
    """Put a recipe on the Hub as anybody could write it."""
    settings = tiny_settings(**{name: changes for name, changes in sections.items() if isinstance(changes, dict)})
    settings |= {name: value for name, value in sections.items() if not isinstance(value, dict)}
    hub.add_file(EVE.repo_id, "recipe.yaml", yaml.safe_dump(settings, sort_keys=False))
    return EVE


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """An empty working folder."""
    place = tmp_path / "work"
    place.mkdir()
    monkeypatch.chdir(place)
    return place


def everything_in(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*")}


# ---- repeating ----


def test_a_published_run_is_repeated_and_evaluated(hub, run, workplace, capsys):
    push_run(run, "ada/tiny")
    assert main(["train", "hub:ada/tiny"]) == 0
    repeated, original = (load_file(folder / "model.safetensors") for folder in (workplace / "runs/tiny", run))
    assert all((repeated[name] == original[name]).all() for name in original)
    capsys.readouterr()
    assert main(["evaluate", "hub:ada/tiny", "--output", "figures.json"]) == 0
    final = json.loads((run / "metrics.json").read_text())["final"]
    assert json.loads(Path("figures.json").read_text())["recall_sum"] == pytest.approx(final["recall_sum"])
    assert main(["evaluate", "ada/tiny", "--data", "scenes", "--max-rows", "8"]) == 0
    assert main(["evaluate", "hub:ada/tiny", "--data", "scenes", "--max-rows", "8"]) == 0


def test_overrides_hold(hub, workplace):
    recipe = pull_recipe(publish(hub), ["selection.ratio=0.25", "training.output_dir=/elsewhere"])
    assert (recipe.selection.ratio, recipe.output_dir) == (0.25, "/elsewhere")


def test_a_revision(hub, workplace, capsys):
    push_run_as = {"main": "first", "v2": "second"}
    for branch, description in push_run_as.items():
        publish(hub, description=description)
        hub.model(EVE.repo_id).branches[branch] = list(hub.model(EVE.repo_id).branches["main"])
    assert pull_recipe(HubAddress.parse("hub:eve/recipe@v2")).description == "second"
    assert main(["train", "hub:eve/recipe@v3"]) == 2
    assert "eve/recipe has no such branch, tag or commit" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["hub:", "hub:name", "hub:a/b/c", "hub:a/b@", "hub:../x", "hub:a b/c"])
def test_what_is_no_address(text, workplace, capsys):
    assert main(["train", text]) == 2
    assert "is not a repository of the Hub; write hub:USER/REPO" in capsys.readouterr().err


def test_what_is_not_there(hub, workplace, capsys):
    assert main(["train", "hub:eve/nothing"]) == 2
    assert "eve/nothing: the Hub has no such model, or it is private" in capsys.readouterr().err
    hub.add_file("eve/empty", "README.md", "nothing")
    assert main(["train", "hub:eve/empty"]) == 2
    assert "eve/empty has no such file" in capsys.readouterr().err


def test_an_unreachable_hub(hub, workplace, capsys, monkeypatch):
    nowhere = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", nowhere)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    with pytest.raises(HubError, match="could not be reached"):
        pull_recipe(EVE)


# ---- a recipe that nobody knows the author of ----


@pytest.mark.parametrize("folder", ["/tmp/outside", "../outside", "runs/../../outside", "~/outside", "C:\\outside"])
def test_the_folder_of_the_run_is_below_runs_whatever_the_recipe_says(hub, workplace, folder):
    assert main(["train", f"hub:{publish(hub, training={'output_dir': folder}).repo_id}"]) == 0
    assert everything_in(workplace) >= {Path("runs/tiny/model.safetensors")}
    assert {path.parts[0] for path in everything_in(workplace)} == {"runs"}
    assert not [path for path in workplace.parent.iterdir() if path.name == "outside"]


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside", "..", ".", "a/b", ""])
def test_nor_does_its_name_lead_elsewhere(hub, workplace, name):
    with pytest.raises(RecipeError, match="name: "):
        pull_recipe(publish(hub, name=name))


def test_nor_does_a_link(hub, workplace):
    (workplace.parent / "elsewhere").mkdir()
    (workplace / "runs").mkdir()
    (workplace / "runs/tiny").symlink_to(workplace.parent / "elsewhere")
    with pytest.raises(RecipeError, match="its folder runs/tiny is a link to .*elsewhere, outside of runs"):
        pull_recipe(publish(hub))
    assert pull_recipe(EVE, output_dir="runs/other").output_dir == "runs/other"


def test_runs_itself_may_be_a_link(hub, workplace):
    (workplace.parent / "large disk").mkdir()
    (workplace / "runs").symlink_to(workplace.parent / "large disk")
    assert pull_recipe(publish(hub)).output_dir == "runs/tiny"


def test_remote_code_needs_the_users_own_word(hub, workplace, capsys):
    publish(hub, model={"trust_remote_code": True})
    assert main(["train", "hub:eve/recipe"]) == 2
    shown = capsys.readouterr().err
    assert "if you have read and trust it, add model.trust_remote_code=true" in shown and not everything_in(workplace)
    assert pull_recipe(EVE, ["model.trust_remote_code=true"]).model.trust_remote_code
    assert not pull_recipe(EVE, ["model.trust_remote_code=false"]).model.trust_remote_code
    publish(hub, model={"trust_remote_code": "yes"})
    with pytest.raises(RecipeError, match="trust_remote_code"):
        pull_recipe(EVE)


TAKES_PLACES_OR_ACCOUNTS = {
    "push_to_hub": True,
    "hub_model_id": "eve/stolen",
    "hub_token": TOKEN,
    "hub_strategy": "all_checkpoints",
    "report_to": ["wandb"],
    "logging_dir": "/tmp/logs",
    "run_name": "x",
    "project": "eve",
    "trackio_space_id": "eve/space",
    "deepspeed": {"tensorboard": {"enabled": True, "output_path": "/tmp/outside"}},
    "fsdp_config": "/etc/passwd",
    "accelerator_config": "/etc/passwd",
    "resume_from_checkpoint": "/tmp/evil",
    "torch_compile_backend": "evil",
}


@pytest.mark.parametrize("name", TAKES_PLACES_OR_ACCOUNTS)
def test_what_pushes_reports_writes_or_names_accounts_is_not_taken_over(hub, workplace, name, caplog):
    publish(hub, training={name: TAKES_PLACES_OR_ACCOUNTS[name]})
    recipe = pull_recipe(EVE)
    assert name not in recipe.training and recipe.training["learning_rate"] == 1e-3
    assert "Not taken over from hub:eve/recipe:" in caplog.text and f"training.{name}" in caplog.text
    assert TOKEN not in caplog.text


def test_a_run_from_the_hub_sends_nothing_to_it(hub, workplace):
    publish(hub, training={"push_to_hub": True, "hub_model_id": "eve/stolen", "save_strategy": "epoch"})
    assert main(["train", "hub:eve/recipe"]) == 0
    assert {method for method, _ in hub.requests} <= {"GET", "HEAD"}


LOCAL = {
    ("model", "name_or_path"): "~/models/private",
    ("model", "second_name_or_path"): "runs/other/../private",
    ("model", "tokenizer"): "/home/zaphod/tokenizer",
    ("data", "path"): "/home/zaphod/.cache/huggingface/token",
    ("data", "image_features"): "/home/zaphod/features.npz",
    ("data", "noise_permutation"): "../order.npy",
    ("selection", "ledger"): "/home/zaphod/runs/x",
}


@pytest.mark.parametrize("key", LOCAL, ids=".".join)
def test_no_place_of_a_machine_is_shared(key):
    (section, name), path = key, LOCAL[key]
    shared, left_out = select_shareable({section: {name: path, "source": "folder"}})
    assert left_out == [".".join(key)] and "/" not in str(shared) and "zaphod" not in str(shared)


PUBLIC = {
    ("model", "name_or_path"): "openai/clip-vit-base-patch32",
    ("model", "second_name_or_path"): "laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
    ("data", "path"): "hf://datasets/ada/pairs/train-{000..009}.tar",
    ("selection", "ledger"): "hub:ada/scores@v1",
}


@pytest.mark.parametrize("key", PUBLIC, ids=".".join)
def test_what_everybody_can_have_is_shared(key):
    settings = {key[0]: {key[1]: PUBLIC[key]}}
    assert select_shareable(settings) == (settings, [])


@pytest.mark.parametrize(
    "address", ["https://me:secret@host/train.tar", "https://host/a.tar?sig=abc", "file:///etc/passwd", "zip://x::/y"]
)
def test_no_password_or_signature_is_shared(address):
    assert select_shareable({"data": {"source": "webdataset", "path": address}})[1] == ["data.path"]


def test_the_tokenizer_of_a_published_run_is_that_of_its_repository():
    shared, left_out = select_shareable({"model": {"tokenizer": "/data/tokenizer"}}, "ada/tiny")
    assert shared["model"]["tokenizer"] == "ada/tiny" and left_out == []


def test_a_recipe_without_its_data_says_what_to_give(hub, workplace, capsys):
    publish(hub, data={"source": "folder", "path": "/data/pairs", "noise_rate": 0})
    assert main(["train", "hub:eve/recipe"]) == 2
    assert "data.path: missing; data.source folder needs one (data.path=...)" in capsys.readouterr().err
    assert pull_recipe(EVE, ["data.path=pairs"]).data.path == "pairs"
    assert main(["evaluate", "hub:eve/recipe"]) == 2
    assert "Name the data with --data" in capsys.readouterr().err


def test_settings_that_load_code_by_themselves_are_not_shared(caplog):
    config = {"model_type": "clip", "vision_config": {"_attn_implementation": "eve/kernel", "auto_map": {"A": "b.C"}}}
    adapter = {"type": "lora", "r": 2, "megatron_core": "evil", "target_modules": ["q_proj", "/x/y"]}
    shared, left_out = select_shareable({"model": {"config": config}, "adapter": adapter})
    assert left_out == [
        *("model.config.vision_config._attn_implementation", "model.config.vision_config.auto_map"),
        *("adapter.megatron_core", "adapter.target_modules.1"),
    ]
    assert "eve" not in str(shared) and "evil" not in str(shared) and shared["adapter"]["r"] == 2


def test_a_recipe_of_the_wrong_shape_is_told(hub, workplace):
    for broken in ({"name": "x", "training": [], "model": 3}, {"name": "x", "data": "/etc", "adapter": "mola"}):
        hub.add_file(EVE.repo_id, "recipe.yaml", yaml.safe_dump(broken))
        with pytest.raises(RecipeError, match="hub:eve/recipe"):
            pull_recipe(EVE)


def test_nothing_that_is_pickled_is_fetched(hub, workplace):
    for name in ("config.json", "model.safetensors", "pytorch_model.bin", "training_args.bin", "evil.py", "x.pt"):
        hub.add_file("eve/model", name, "{}")
    assert {path.name for path in download_model(HubAddress("eve/model")).iterdir()} == {
        *("config.json", "model.safetensors")
    }


# ---- as a user would ----


def test_with_the_environment_alone(hub: LoopbackHub, run, workplace):
    """The real commands, with the variables that the client reads."""
    variables = {
        "HF_ENDPOINT": hub.address,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(workplace / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_DATASETS_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    shutil.copytree(run, "tiny")
    lines = [
        [sys.executable, "-m", "hf_dissect.cli", "push", "tiny", "ada/tiny", "--private"],
        [sys.executable, "-c", "from transformers import CLIPModel; CLIPModel.from_pretrained('ada/tiny')"],
    ]
    for line in lines:
        done = subprocess.run(line, env=os.environ | variables, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    assert hub.model("ada/tiny").private
