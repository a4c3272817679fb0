"""Published scores are read by `datasets`, tell nothing but ids and scores, and can begin another run."""

import logging
import shutil
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from huggingface_hub import DatasetCard
from testing import hub_client
from testing.loopback_hub import Fault, LoopbackHub
from testing.tiny_recipe import tiny_recipe

from hf_dissect.cli import main
from hf_dissect.hub.repository import HubError
from hf_dissect.runs.push_ledger import format_ledger_card, push_ledger
from hf_dissect.runs.run import build_trainer
from hf_dissect.selection import SampleLedger
from hf_dissect.selection.ledger import SavedLedger, read_ledger


def test_the_scores_are_read_as_they_were_recorded(hub: LoopbackHub, run, capsys):
    assert main(["push-ledger", str(run), "ada/scores"]) == 0
    assert f"2 files  {hub.address}/datasets/ada/scores" in capsys.readouterr().out
    scores = datasets.load_dataset("ada/scores", split="train").with_format("torch")[:]
    ledger = read_ledger(run / "ledger.safetensors")
    assert torch.equal(scores["sample_id"], torch.arange(64))
    assert scores.keys() - {"sample_id"} == {"correlation", "history"} == ledger.columns.keys()
    for name, values in ledger.columns.items():
        assert torch.equal(scores[name].nan_to_num(nan=-1), values.nan_to_num(nan=-1))


def test_what_was_never_scored_is_null_or_left_out(hub, tmp_path):
    ledger = SampleLedger(5, ("correlation", "history"))
    ledger.write("correlation", torch.tensor([0, 3]), torch.tensor([1.0, 2.0]))
    ledger.write("history", torch.tensor([3]), torch.tensor([4.0]))
    ledger.save(tmp_path / "ledger.safetensors")
    push_ledger(tmp_path, "ada/scores")
    assert datasets.load_dataset("ada/scores", split="train").to_list() == [
        {"sample_id": 0, "correlation": 1.0, "history": None},
        {"sample_id": 3, "correlation": 2.0, "history": 4.0},
    ]


def test_a_private_ledger_is_updated_and_shrinks(hub: LoopbackHub, run, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(run, tmp_path / "own"))
    monkeypatch.setattr("hf_dissect.selection.ledger_files.PAIRS_PER_FILE", 20)
    push_ledger(folder, "ada/scores", private=True)
    pushed = hub.dataset("ada/scores")
    assert pushed.private and sum(path.endswith(".parquet") for path in pushed.files) == 4
    assert len(datasets.load_dataset("ada/scores", split="train")) == 64
    push_ledger(folder, "ada/scores")
    assert len(pushed.commits) == 1
    monkeypatch.setattr("hf_dissect.selection.ledger_files.PAIRS_PER_FILE", 100)
    push_ledger(folder, "ada/scores")
    assert pushed.files.keys() == {"README.md", "data/train-00000-of-00001.parquet"}


def test_a_fault_on_the_way_is_got_over(hub: LoopbackHub, run, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    hub.faults = [Fault("PUT", "/lfs/", how="reset"), Fault("POST", "/commit/", how=500)]
    push_ledger(run, "ada/scores")
    assert [fault.struck for fault in hub.faults] == [1, 1] and len(hub.dataset("ada/scores").commits) == 1


def test_no_published_file_tells_more_than_ids_and_scores(hub: LoopbackHub, run, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(run, tmp_path / "zaphod" / "own"))
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        recipe.read_text().replace("source: scenes\n  path: null", "source: folder\n  path: /data/zaphod")
    )
    monkeypatch.setenv("HOME", str(tmp_path / "zaphod"))
    push_ledger(folder, "ada/scores")
    for secret in (str(folder), "zaphod", hub_client.TOKEN, hub.address, "circle"):
        assert not [name for name, content in hub.dataset("ada/scores").files.items() if secret.encode() in content]


def test_the_card(hub: LoopbackHub, run):
    push_ledger(run, "ada/scores")
    text = hub.dataset("ada/scores").files["README.md"].decode()
    card = DatasetCard(text)
    assert card.data.size_categories == ["n<1K"] and "sample-selection" in card.data.tags
    assert "the run tiny" in text and "64 pairs" in text and "the share 0.25 was shuffled on purpose" in text
    assert '| `selection.strategy` | "dissect" |' in text
    names: dict = {}
    exec(text.split("```python\n")[1].split("```")[0], names)
    correlation = read_ledger(run / "ledger.safetensors").columns["correlation"]
    best = correlation[torch.tensor(names["best"].tolist())]
    assert sorted(best.tolist(), reverse=True) == correlation.topk(32).values.tolist()


def test_texts_of_the_recipe_cannot_break_the_card():
    ledger = SampleLedger(None, ("correlation", "<b>|"))
    ledger.write("correlation", torch.tensor([7]), torch.tensor([1.0]))
    settings = {
        "name": "x\n---\n# <script>",
        "data": {"source": "hub", "path": "ada/pairs", "id_column": "<i>|", "caption_column": "<script>"},
        "selection": {"strategy": "<script>alert(1)</script>|", "options": {"`": "]("}},
    }
    saved = SavedLedger(None, ledger.ids, {name: ledger.column(name) for name in ledger.columns}, {})
    text = format_ledger_card(saved, settings, "ada/scores")
    head, body = text.removeprefix("---\n").split("\n---\n", 1)
    assert yaml.safe_load(head)["source_datasets"] == ["ada/pairs"]
    assert "<" not in body and "\n---" not in body and body.count("\n# ") == 1
    assert "the column &#60;i&#62;&#124; of the data" in body


def test_what_cannot_be_published(hub, tmp_path, capsys):
    assert main(["push-ledger", str(tmp_path), "ada/scores"]) == 2
    assert "has no ledger.safetensors; name the folder of a run" in capsys.readouterr().err
    SampleLedger(5).save(tmp_path / "ledger.safetensors")
    with pytest.raises(HubError, match="its ledger holds no score"):
        push_ledger(tmp_path, "ada/scores")
    assert not hub.repositories


def test_a_run_begins_with_published_scores(hub, run, tmp_path, caplog):
    push_ledger(run, "ada/scores")
    selection = {"ledger": "hub:ada/scores", "warmup_epochs": 0}
    trainer = build_trainer(tiny_recipe(tmp_path / "second", selection=selection))
    with caplog.at_level(logging.WARNING):
        trainer.train()
    history = read_ledger(run / "ledger.safetensors").columns["history"]
    assert torch.equal(trainer.ledger.column("history").nan_to_num(nan=-1), history.nan_to_num(nan=-1))
    assert "warm up" not in caplog.text
