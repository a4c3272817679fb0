"""A published run loads as printed, holds nothing private, and may break off at any point of the way."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import get_token, hf_hub_download
from testing import hub_client
from testing.loopback_hub import Fault, LoopbackHub
from transformers import CLIPModel, CLIPProcessor

from hf_dissect.cli import main
from hf_dissect.data.bad_rows import BadReason, BadRows
from hf_dissect.data.problems import join_problem
from hf_dissect.hub.published_files import select_published_files
from hf_dissect.hub.push import push_run
from hf_dissect.hub.repository import HubError
from hf_dissect.recipe.yaml import parse_yaml

EXPECTED = {
    *("README.md", "config.json", "metrics.json", "model.safetensors", "processor_config.json", "recipe.yaml"),
    *("report.png", "tokenizer.json", "tokenizer_config.json"),
    *("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"),
}


@pytest.fixture
def own_run(run: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be changed."""
    return Path(shutil.copytree(run, tmp_path / "runs" / "own"))


def test_what_is_published_loads_with_transformers_alone(hub, run, capsys):
    assert main(["push", str(run), "ada/tiny"]) == 0
    assert f"12 files  {hub.address}/ada/tiny" in capsys.readouterr().out
    assert hub.model("ada/tiny").files.keys() == EXPECTED and not hub.model("ada/tiny").private
    model = CLIPModel.from_pretrained("ada/tiny")
    local = CLIPModel.from_pretrained(run)
    assert all(torch.equal(value, local.state_dict()[name]) for name, value in model.state_dict().items())
    assert "a red circle" in CLIPProcessor.from_pretrained("ada/tiny").tokenizer.decode(
        CLIPProcessor.from_pretrained(run)(text="a red circle")["input_ids"]
    )


def test_nothing_but_the_list_goes_out(hub, own_run):
    (own_run / "checkpoint-8").mkdir()
    for name in ("training_args.bin", "optimizer.pt", "checkpoint-8/model.safetensors", "notes.txt", ".env", "a.json"):
        (own_run / name).write_bytes(b"secret")
    push_run(own_run, "ada/tiny")
    assert hub.model("ada/tiny").files.keys() == EXPECTED


def test_the_names_of_tasks_go_along(hub, own_run):
    (own_run / "tasks.json").write_text("[]")
    assert set(push_run(own_run, "ada/tiny").files) == EXPECTED | {"tasks.json"}


def test_a_second_push_sends_only_what_changed(hub, own_run):
    push_run(own_run, "ada/tiny")
    uploads = list(hub.uploads)
    push_run(own_run, "ada/tiny")
    assert len(hub.model("ada/tiny").commits) == 1 and hub.uploads == uploads
    metrics = json.loads((own_run / "metrics.json").read_text())
    (own_run / "metrics.json").write_text(json.dumps(metrics | {"name": "renamed"}))
    push_run(own_run, "ada/tiny")
    assert hub.model("ada/tiny").commits[-1].changed == ["metrics.json"] and hub.uploads == uploads


def test_what_no_longer_belongs_to_the_run_goes_and_what_is_not_ours_stays(hub, own_run):
    (own_run / "tasks.json").write_text("[]")
    push_run(own_run, "ada/tiny")
    hub.add_file("ada/tiny", "LICENSE", "free")
    hub.add_file("ada/tiny", "model-00001-of-00002.safetensors", "of an earlier run")
    (own_run / "tasks.json").unlink()
    push_run(own_run, "ada/tiny")
    assert hub.model("ada/tiny").files.keys() == EXPECTED | {"LICENSE"}


def test_a_name_alone_is_a_repository_of_the_user(hub, run):
    assert push_run(run, "tiny").repo_id == "ada/tiny" and ("model", "ada/tiny") in hub.repositories


def test_another_branch(hub, run):
    push_run(run, "ada/tiny", revision="seed-1")
    assert hub.model("ada/tiny").files == {}
    assert hub.model("ada/tiny").branches["seed-1"][-1].files.keys() == EXPECTED


def test_private(hub, run, capsys, monkeypatch, tmp_path):
    assert main(["push", str(run), "ada/hidden", "--private"]) == 0
    assert hub.model("ada/hidden").private
    hf_hub_download("ada/hidden", "recipe.yaml")
    monkeypatch.setenv("HF_TOKEN", "hf_loopback_bob")
    monkeypatch.setattr(hub_client.constants, "HF_HUB_CACHE", str(tmp_path / "cache of bob"))
    assert main(["evaluate", "hub:ada/hidden"]) == 2
    assert "the Hub has no such model, or it is private" in capsys.readouterr().err


def test_a_public_repository_is_not_taken_for_a_private_one(hub, run):
    push_run(run, "ada/tiny")
    with pytest.raises(HubError, match="exists and is public"):
        push_run(run, "ada/tiny", private=True)


# ---- what cannot work ----


def test_a_wrong_token(hub, run, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    assert main(["push", str(run), "ada/tiny"]) == 2
    shown = capsys.readouterr().err
    assert "the Hub does not know the token; log in with `hf auth login`" in shown and len(shown.splitlines()) == 1
    assert "hf_nobody" not in shown and not hub.repositories


def test_no_token(hub, run, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert get_token() is None
    with pytest.raises(HubError, match="nobody is logged in"):
        push_run(run, "ada/tiny")


@pytest.mark.parametrize("exists", [False, True])
def test_the_repository_of_somebody_else(hub, run, exists):
    if exists:
        hub.add_file("bob/tiny", "README.md", "mine")
    with pytest.raises(HubError, match="may not write there; name a repository of your own"):
        push_run(run, "bob/tiny")
    assert not exists or hub.model("bob/tiny").files == {"README.md": b"mine"}


def test_an_existing_repository_of_ones_own_is_written_to(hub, run):
    hub.add_file("ada/tiny", "README.md", "old")
    push_run(run, "ada/tiny")
    assert b"tiny" in hub.model("ada/tiny").files["README.md"]


def test_what_is_no_finished_run(hub, own_run, tmp_path, capsys):
    assert main(["push", "nowhere", "ada/tiny"]) == 2
    assert "nowhere: there is no such folder" in capsys.readouterr().err
    with pytest.raises(HubError, match="holds several runs; push one of them, such as .*own"):
        push_run(own_run.parent, "ada/tiny")
    (own_run / "metrics.json").unlink()
    with pytest.raises(HubError, match="holds no finished run, which has a model and metrics.json; name the folder"):
        push_run(own_run, "ada/tiny")
    (own_run / "checkpoint-4").mkdir()
    with pytest.raises(HubError, match="let it end first"):
        push_run(own_run, "ada/tiny")
    assert not hub.requests


def test_offline(hub, run, monkeypatch):
    monkeypatch.setattr(hub_client.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="switched off by HF_HUB_OFFLINE"):
        push_run(run, "ada/tiny")


# ---- what breaks off ----

STEPS = {
    "who it is": ("GET", "/whoami-v2"),
    "creating": ("POST", "/repos/create"),
    "the kinds of files": ("POST", "/preupload/"),
    "the batch": ("POST", "/objects/batch"),
    "the weights": ("PUT", "/lfs/"),
    "the commit": ("POST", "/commit/"),
}


@pytest.fixture
def impatient(monkeypatch):
    """The client's own pauses, of a second and more, are left out."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)


@pytest.mark.parametrize("how", [500, "reset", "lost"])
@pytest.mark.parametrize("step", STEPS)
def test_a_fault_on_the_way_is_got_over(hub: LoopbackHub, run, impatient, step, how):
    hub.faults = [Fault(*STEPS[step], how=how)]
    push_run(run, "ada/tiny")
    assert hub.faults[0].struck == 1
    assert hub.model("ada/tiny").files.keys() == EXPECTED and len(hub.model("ada/tiny").commits) == 1
    assert hub.uploads.count(hub.uploads[0]) <= 2


def test_an_interrupted_push_publishes_nothing_and_goes_on(hub: LoopbackHub, run, impatient, capsys):
    hub.faults = [Fault("POST", "/commit/", times=100, how="reset")]
    assert main(["push", str(run), "ada/tiny"]) == 2
    assert "run the same command again, and only the rest is sent" in capsys.readouterr().err
    assert hub.model("ada/tiny").files == {} and len(hub.uploads) == 2  # weights and picture
    hub.faults = []
    assert main(["push", str(run), "ada/tiny"]) == 0
    assert hub.model("ada/tiny").files.keys() == EXPECTED and len(hub.uploads) == 2


# ---- what is private ----


def test_no_published_file_tells_of_this_machine(hub: LoopbackHub, own_run, monkeypatch):
    monkeypatch.setenv("HOME", str(own_run.parents[2]))
    monkeypatch.setenv("USER", "zaphod")
    push_run(own_run, "ada/tiny")
    published = hub.model("ada/tiny").files
    for secret in (str(own_run), str(own_run.parent), str(Path.home()), "zaphod", hub_client.TOKEN, hub.address):
        assert not [name for name, content in published.items() if secret.encode() in content], secret
    recipe = parse_yaml(published["recipe.yaml"].decode())
    assert "output_dir" not in recipe["training"] and recipe["training"]["learning_rate"] == 1e-3
    assert published["recipe.yaml"].startswith(
        b"# The recipe of this model. Repeat it with: hf-dissect train hub:ada/tiny"
    )


def test_the_card_names_the_repository(hub, run):
    push_run(run, "ada/tiny")
    card = hub.model("ada/tiny").files["README.md"].decode()
    assert '"ada/tiny"' in card and '"."' in (run / "README.md").read_text() and '"."' not in card


def test_paths_in_configurations_are_nulled(own_run):
    config = json.loads((own_run / "config.json").read_text())
    base = {"_name_or_path": str(own_run), "nested": [{"cache": "~/models/x"}], "token": "/", "words": "and/or"}
    (own_run / "config.json").write_text(json.dumps(config | base))
    content = json.loads(select_published_files(own_run, "ada/tiny")[0]["config.json"])
    assert content == config | {"_name_or_path": None, "nested": [{"cache": None}], "token": "/", "words": "and/or"}


def test_the_paths_of_unreadable_pictures_are_not_published_and_do_not_stop_a_push(own_run):
    metrics = json.loads((own_run / "metrics.json").read_text())
    rows = BadRows(1.0, num_pairs=9)
    problem = join_problem("no such file", str(Path.home() / "pictures" / "7.jpg"))
    rows.add(torch.tensor([7]), torch.tensor([BadReason.IMAGE], dtype=torch.int8), {0: problem})
    (own_run / "metrics.json").write_text(json.dumps({**metrics, "bad_rows": rows.summary()}))
    content = json.loads(select_published_files(own_run, "ada/tiny")[0]["metrics.json"])
    assert content["bad_rows"]["problems"] == [{"id": 7, "problem": "no such file", "path": None}]


@pytest.mark.parametrize(
    "private", ["{folder}", "{home}/data", "token {token}", "hf_abcdefghijklmnopqrstuvwxyz"], ids=lambda text: text[:8]
)
def test_what_still_names_something_private_is_not_published(hub, own_run, private, monkeypatch):
    monkeypatch.setenv("HOME", "/home/zaphod")
    text = private.format(folder=own_run.absolute(), home=Path.home(), token=hub_client.TOKEN)
    with open(own_run / "README.md", "a") as card:
        card.write(text)
    with pytest.raises(HubError, match="README.md would publish .*Nothing was sent"):
        push_run(own_run, "ada/tiny")
    assert not hub.repositories


def test_a_run_of_local_files_leaves_their_places_out(hub, own_run, capsys):
    recipe = own_run / "recipe.yaml"
    recipe.write_text(
        recipe.read_text().replace("source: scenes\n  path: null", "source: folder\n  path: /data/pairs")
    )
    assert main(["push", str(own_run), "ada/tiny"]) == 0
    assert "left out, as it is of this machine: " in (shown := capsys.readouterr().err)
    assert "training.output_dir" in shown and "data.path" in shown
    published = hub.model("ada/tiny").files["recipe.yaml"].decode()
    assert "yours to set: data.path (such as data.path=...)" in published and "/data/pairs" not in published
