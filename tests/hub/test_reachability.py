"""A Hub that does not answer is found out within seconds, before anything is loaded, and named by the setting."""

import socket
import time
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from testing.tiny_recipe import write_tiny_recipe

from hf_dissect.cli import main
from hf_dissect.hub.reachability import HubNeed, HubUnreachable, check_reachable


@pytest.fixture(params=["refused", "silent"])
def outage(request, tmp_path, monkeypatch):
    """A Hub whose machine refuses connections, or accepts them and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        if request.param == "silent":
            listening.listen(10)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{listening.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("hf_dissect.hub.reachability.ANSWER_S", 0.3)
        close_session()
        yield listening
    close_session()


LINES = {
    "train tiny.yaml training.push_to_hub=true": "training.push_to_hub: 'tiny'",
    "train tiny.yaml model.config=null model.name_or_path=ada/clip": "model.name_or_path: 'ada/clip'",
    "train tiny.yaml model.tokenizer=gpt2": "model.tokenizer: 'gpt2'",
    "train tiny.yaml selection.ledger=hub:ada/scores": "selection.ledger: 'ada/scores'",
    "train hub:ada/mine": "recipe: 'hub:ada/mine'",
    "compare hub:ada/mine": "recipe: 'hub:ada/mine'",
    "evaluate ada/clip --data scenes": "model: 'ada/clip'",
    "evaluate hub:ada/mine": "model: 'ada/mine'",
    "push done ada/mine": "repository: 'ada/mine'",
}


@pytest.mark.parametrize("line", LINES)
def test_each_command_says_so_within_seconds(line, outage, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_tiny_recipe(tmp_path / "tiny.yaml", data={"source": "scenes"})
    Path("done").mkdir()
    for name in ("metrics.json", "config.json", "model.safetensors"):
        Path("done", name).write_text("{}")
    start = time.monotonic()
    assert main(line.split()) == 2
    shown = capsys.readouterr().err
    assert LINES[line] in shown and "could not be reached" in shown and constants.ENDPOINT in shown, shown
    assert len(shown.splitlines()) == 1 and time.monotonic() - start < 10
    assert not list(tmp_path.glob("runs/*/*"))


def test_all_that_is_needed_is_named_and_the_cache_is_pointed_out(outage, tmp_path):
    needs = [HubNeed("model.name_or_path", "ada/clip"), HubNeed("data.path", "ada/pairs", "dataset")]
    with pytest.raises(HubUnreachable, match="model.name_or_path: 'ada/clip'; data.path: 'ada/pairs': .*HF_ENDPOINT"):
        check_reachable(needs)
    for name in ("models--ada--clip", "datasets--ada--pairs"):
        (tmp_path / "cache" / name / "snapshots" / "0").mkdir(parents=True)
    with pytest.raises(HubUnreachable, match="all of it is in the cache: set HF_HUB_OFFLINE=1"):
        check_reachable(needs)


def test_nothing_is_asked_without_a_need_or_offline(outage, monkeypatch):
    check_reachable([])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    check_reachable([HubNeed("model", "ada/clip")])


def test_any_answer_will_do(hub):
    check_reachable([HubNeed("model", "ada/none")])
