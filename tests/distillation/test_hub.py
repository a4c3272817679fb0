"""A distilled student is published, repeated, pushed while it trains and evaluated by the commands of all runs."""

import json
import re
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load, load_file
from testing import tiny_models
from testing.hub_client import TOKEN
from testing.loopback_hub import LoopbackHub
from testing.tiny_modalities import tiny_columns, tiny_trainer
from transformers import AutoModel, CLIPVisionModel

from hf_dissect.cli import main
from hf_dissect.data import make_scenes
from hf_dissect.distillation import DistillationRecipe
from hf_dissect.hub.address import HubAddress
from hf_dissect.hub.pull import pull_recipe
from hf_dissect.hub.push import push_run
from hf_dissect.hub.shared_recipe import select_shareable
from hf_dissect.recipe.recipe import RecipeError
from hf_dissect.runs.distil import run_distillation

SMALL = ["training.max_steps=2", "training.use_cpu=true", "training.per_device_train_batch_size=8"]
SMALL += ["training.report_to=none", "training.disable_tqdm=true", "training.eval_strategy=no"]
STUDENT = {"README.md", "config.json", "model.safetensors", "recipe.yaml", "metrics.json"}
ENCODER = {"encoder/config.json", "encoder/model.safetensors"}
EVE = HubAddress("eve/recipe")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Where this user works; in no published file."""
    return tmp_path_factory.mktemp("zaphod")


@pytest.fixture(scope="module")
def arrays(place) -> Path:
    """Depth, skeleton and inertial arrays of eight subjects."""
    columns = tiny_columns(32) | {"subject": np.arange(32) // 4 + 1}
    np.savez(place / "rows.npz", **columns | {"skeleton": columns["skeleton"].reshape(32, 6, 2, 3)})
    return place / "rows.npz"


def array_recipe(arrays: Path, folder: Path, *overrides: str) -> DistillationRecipe:
    encoders = [
        "student.config={model_type: frame_sequence_encoder, channels: [4], hidden_size: 8, grid: [4, 1]}",
        "auxiliaries.skeleton.config={model_type: sequence_encoder, num_channels: 6, hidden_size: 8}",
        "auxiliaries.inertial.config={model_type: sequence_encoder, num_channels: 2, hidden_size: 8}",
    ]
    run = [f"data.path={arrays}", f"training.output_dir={folder}"]
    return DistillationRecipe.load("amid-utd-mhad", [*encoders, *run, *SMALL, *overrides])


@pytest.fixture(scope="module")
def run(arrays, place) -> Path:
    """The folder of a finished run with a student of arrays, not to be changed."""
    run_distillation(array_recipe(arrays, place / "run", "training.save_strategy=steps", "training.save_steps=2"))
    return place / "run"


@pytest.fixture(scope="module")
def picture_run(place) -> Path:
    """That of a student of pictures, which began with a model in a local folder; not to be changed."""
    for part in tiny_models.tiny_clip():
        part.save_pretrained(place / "clip")
    (place / "birds").mkdir()
    for split in ("train", "test"):
        rows = make_scenes(16, split=split).add_column("label", ["wren", "robin"] * 8)
        rows.to_parquet(place / "birds" / f"{split}.parquet")
    clip = [f"{part}={place / 'clip'}" for part in ("student.name_or_path", "auxiliaries.caption.name_or_path")]
    more = [f"student.processor={place / 'clip'}", f"data.path={place / 'birds'}", "data.validation_split=null"]
    more += ["training.save_strategy=no", f"training.output_dir={place / 'pictures'}"]
    run_distillation(DistillationRecipe.load("amid-clip", [*clip, *more, *SMALL]))
    return place / "pictures"


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- publishing ----


def test_what_is_published_loads_as_the_card_says_and_holds_nothing_of_this_machine(hub, picture_run, place, capsys):
    assert main(["push", str(picture_run), "ada/birds"]) == 0
    left_out = "student.name_or_path, auxiliaries.caption.name_or_path"
    shown = capsys.readouterr().err
    assert left_out in shown and "data.path" in shown
    files = hub.model("ada/birds").files
    preprocessor = {"preprocessor_config.json", "encoder/preprocessor_config.json"}
    assert files.keys() == STUDENT | ENCODER | preprocessor
    for secret in (str(place), "zaphod", TOKEN, str(Path.home())):
        assert not [name for name, content in files.items() if secret.encode() in content], secret
    recipe = yaml.safe_load(files["recipe.yaml"])
    assert recipe["student"]["processor"] == "ada/birds" and recipe["data"]["path"] is None
    names: dict = {}
    (snippet,) = re.findall(r"^```python\n(.*?)^```$", files["README.md"].decode(), re.MULTILINE | re.DOTALL)
    exec(compile(snippet, "README.md", "exec"), names)
    assert names["model_id"] == "ada/birds" and capsys.readouterr().out.startswith(("wren", "robin"))
    assert type(CLIPVisionModel.from_pretrained("ada/birds", subfolder="encoder")) is CLIPVisionModel


def test_the_hub_reads_the_card(hub, picture_run):
    push_run(picture_run, "ada/birds")
    card = ModelCard(hub.model("ada/birds").files["README.md"].decode())
    assert {"hf_dissect", "knowledge-distillation", "amid"} <= set(card.data.tags)
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "image-classification")
    final = json.loads((picture_run / "metrics.json").read_text())["final"]
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results == {name: pytest.approx(final[name]) for name in ("student_accuracy", "retrieval_R@1")}
    assert "arXiv:2306.07646" in card.text and "wren" in card.text and "of the test rows" in card.text


def test_a_run_with_push_to_hub_publishes_the_student_at_each_save(hub: LoopbackHub, arrays, place):
    pushing = ["push_to_hub=true", "hub_model_id=ada/pushed", "hub_strategy=all_checkpoints", "hub_always_push=true"]
    pushing += ["save_strategy=steps", "save_steps=1"]
    folder = place / "pushing"
    run_distillation(array_recipe(arrays, folder, *(f"training.{setting}" for setting in pushing)))
    pushed = hub.model("ada/pushed")
    assert {path for path in pushed.files if not path.startswith("checkpoint-")} == STUDENT | ENCODER
    published = [commit.files["model.safetensors"].content for commit in pushed.commits]
    saved = [(folder / f"checkpoint-{step}/student/model.safetensors").read_bytes() for step in (1, 2)]
    assert published[0] == saved[0] != saved[1] == published[-1]
    assert b"Training is not finished" in pushed.commits[0].files["README.md"].content
    assert b"Training is not finished" not in pushed.files["README.md"]
    assert any(name.startswith("teacher.") for name in load(pushed.files["checkpoint-1/model.safetensors"]))
    for secret in (str(place), "zaphod", TOKEN):
        assert not [path for path, content in pushed.files.items() if secret.encode() in content], secret


def test_a_trainer_without_a_recipe_is_pushed_and_evaluated(hub: LoopbackHub, workplace, arrays, capsys):
    trainer = tiny_trainer(workplace / "mine", evaluation=tiny_columns(16, seed=1), save_run_folder=True)
    trainer.train()
    done = trainer.push_to_hub("Done", private=True, license="mit", tags="depth")
    assert (done.repo_id, hub.model("ada/mine").private) == ("ada/mine", True)
    assert set(done.files) == (STUDENT | ENCODER) - {"recipe.yaml"}
    card = ModelCard(hub.model("ada/mine").files["README.md"].decode())
    assert card.data.license == "mit" and "depth" in card.data.tags and 'model_id = "ada/mine"' in card.text
    pushed = AutoModel.from_pretrained("ada/mine").state_dict()
    assert all(torch.equal(value, pushed[name]) for name, value in trainer.student.state_dict().items())
    assert main(["evaluate", "ada/mine", "--data", str(arrays), "--split", "train"]) == 0
    assert main(["evaluate", "mine"]) == 2
    assert "mine has no recipe.yaml to take the data from; name the data with --data" in capsys.readouterr().err


# ---- repeating ----


def test_a_published_run_is_repeated(hub, run, arrays, workplace, capsys):
    push_run(run, "ada/student")
    capsys.readouterr()
    assert main(["train", "hub:ada/student"]) == 2
    assert "data.path: missing; data.source npz needs one (data.path=...)" in capsys.readouterr().err
    given = [f"data.path={arrays}", "training.report_to=none", "training.disable_tqdm=true"]
    assert main(["train", "hub:ada/student", *given]) == 0
    repeated, original = (load_file(folder / "model.safetensors") for folder in (Path("runs/amid-utd-mhad"), run))
    assert repeated.keys() == original.keys() and all((repeated[name] == original[name]).all() for name in original)
    assert main(["compare", "hub:ada/student"]) == 2
    assert "makes this the recipe of a distillation" in capsys.readouterr().err


def publish(hub: LoopbackHub, **sections) -> HubAddress:
    """Put the recipe of a distillation on the Hub as anybody could write it."""
    settings = DistillationRecipe.load("amid-utd-mhad", ["data.path=ada/rows", "data.source=hub"])
    settings = settings.to_dict()
    for name, changes in sections.items():
        settings[name] = settings[name] | changes
    hub.add_file(EVE.repo_id, "recipe.yaml", yaml.safe_dump(settings, sort_keys=False))
    return EVE


def test_a_recipe_of_the_hub_is_not_trusted(hub, workplace, caplog):
    training = {"output_dir": "/tmp/outside", "push_to_hub": True, "hub_token": TOKEN, "report_to": ["wandb"]}
    config = {"model_type": "frame_sequence_encoder", "auto_map": {"AutoModel": "evil.Model"}}
    recipe = pull_recipe(publish(hub, training=training, student={"config": config}), kind=DistillationRecipe)
    assert recipe.output_dir == "runs/amid-utd-mhad" and "push_to_hub" not in recipe.training
    assert "hub_token" not in recipe.training and not recipe.student.config["auto_map"]
    assert "training.push_to_hub" in caplog.text and TOKEN not in caplog.text


def test_remote_code_needs_the_users_own_word(hub, workplace, capsys):
    code = {"column": "inertial", "name_or_path": "eve/encoder", "trust_remote_code": True}
    publish(hub, auxiliaries={"inertial": code})
    assert main(["train", "hub:eve/recipe"]) == 2
    key = "auxiliaries.inertial.trust_remote_code"
    assert f"if you have read and trust it, add {key}=true" in capsys.readouterr().err
    assert pull_recipe(EVE, [f"{key}=true"], kind=DistillationRecipe).auxiliaries["inertial"].trust_remote_code
    with pytest.raises(RecipeError, match=key):
        pull_recipe(EVE, ["student.trust_remote_code=true"], kind=DistillationRecipe)


def test_no_place_of_a_machine_is_shared():
    local = {"name_or_path": "/home/zaphod/clip", "processor": "~/clip", "config": {"weights": "/home/zaphod/x"}}
    settings = {"student": local, "auxiliaries": {"a.b": deepcopy(local)}}
    settings["data"] = {"source": "npz", "path": "zaphod"}
    shared, left_out = select_shareable(settings)
    keys = [f"{part}.{name}" for part in ("student", "auxiliaries.a.b") for name in ("name_or_path", "processor")]
    assert left_out == ["data.path", *keys, "student.config.weights", "auxiliaries.a.b.config.weights"]
    assert "zaphod" not in str(shared)
    public = {"student": {"name_or_path": "openai/clip-vit-base-patch32", "processor": "hub:ada/x"}}
    assert select_shareable(public) == (public, [])


# ---- evaluating ----


def figures(*arguments: str) -> dict[str, float]:
    assert main(["evaluate", *arguments, "--output", "figures.json"]) == 0
    return json.loads(Path("figures.json").read_text())


@pytest.mark.parametrize("kind", ["run", "picture_run"])
def test_a_run_is_evaluated_on_the_test_rows_of_its_recipe(kind, request, workplace, capsys):
    folder = request.getfixturevalue(kind)
    final = json.loads((folder / "metrics.json").read_text())["final"]
    found = figures(str(folder))
    assert found["num_rows"] == 16
    assert all(found[name] == pytest.approx(final[name]) for name in ("student_accuracy", "retrieval_R@1"))
    assert "student_accuracy" in capsys.readouterr().out
    assert figures(str(folder), "--max-rows", "5", "--batch-size", "2")["num_rows"] == 5


def test_a_published_student_and_a_checkpoint_are_evaluated_alike(hub, run, arrays, workplace, caplog, capsys):
    push_run(run, "ada/student")
    own = figures(str(run))
    assert figures(str(run / "checkpoint-2")) == own
    for name in ("ada/student", "hub:ada/student"):
        assert figures(name, "--data", str(arrays)) == own  # by the groups of the published recipe
    assert figures(str(run), "--data", str(arrays), "--split", "validation")["num_rows"] == 4
    assert main(["evaluate", "hub:ada/student"]) == 2
    assert "does not name its data; name them with --data" in capsys.readouterr().err
    columns = dict(np.load(arrays))
    np.savez("others.npz", video=columns["depth"], verb=columns["action"])
    named = ["--image-column", "video", "--label-column", "verb"]
    assert figures("ada/student", "--data", "others.npz", *named)["num_rows"] == 32
    assert "The data have no split 'test'; all of them are evaluated" in caplog.text


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--classes", "cat,dog", "--caption-column", "text"], "leave out --caption-column, --classes"),
        (["--split", "dev"], "split 'dev': the data have train, validation, test"),
        (["--label-column", "verb"], "There is no column 'verb'"),
        (["--data", "nowhere.npz"], "there is no .npz file"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, message, run, workplace, capsys):
    assert main(["evaluate", str(run), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_commands_about_pairs_say_what_to_do_with_a_student(run, workplace, capsys):
    assert main(["audit", str(run)]) == 2
    assert f"run: hf-dissect evaluate {run}" in capsys.readouterr().err
    assert main(["push-ledger", str(run), "ada/scores"]) == 2
    assert f"publish its student with: hf-dissect push {run} ada/scores" in capsys.readouterr().err
