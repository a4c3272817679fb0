"""Every command and snippet of the README is carried out, made small, so that none of them can go stale."""

import io
import json
import re
import shlex
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import ClassLabel
from testing import hub_client, tiny_models
from testing.loopback_hub import serving
from testing.tiny_recipe import tiny_settings

from hf_dissect import DissectTrainer, DissectTrainingArguments, make_scenes
from hf_dissect.cli import main
from hf_dissect.data import make_scene_classes
from hf_dissect.data.loading import SOURCES
from hf_dissect.recipe.file import shipped_recipes
from hf_dissect.recipe.recipe import Recipe
from hf_dissect.selection import STRATEGIES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

SCRATCH = f"model.config={json.dumps(tiny_settings()['model']['config'])}"
SMALL = ["training.per_device_train_batch_size=16", "training.max_steps=2", "training.use_cpu=true"]
SCENES = [SCRATCH, "data.scenes_train=64", "data.scenes_validation=16", "data.scenes_test=16", *SMALL]
FINETUNE = ["model.name_or_path=clip", *SMALL]
STREAM = ["data.source=webdataset", "data.path=shards", "data.validation_split=null", "evaluation.retrieval=false"]
PAPER = [SCRATCH, *SMALL, *STREAM, "model.tokenizer=clip", "model.max_caption_length=16", "data.num_workers=0"]
PAPER += ["data.image_column=image", "data.caption_column=caption", "training.bf16=false"]
PAPER += ["training.eval_strategy=no"]

UTD = ["training.per_device_train_batch_size=8", "training.max_steps=2", "training.use_cpu=true"]
UTD += ["student.config.grid=[1, 1]"]

# What is added to each command to make it small; None for the targets of make, which are looked up only.
COMMANDS = {
    "make quickstart": None,
    "make test": None,
    "hf-dissect train mine.yaml": FINETUNE,
    "hf-dissect train mine.yaml selection.ratio=0.3 selection.options.variant=momentum": FINETUNE,
    "hf-dissect train runs/mine/recipe.yaml": [],
    "hf-dissect train mine.yaml --resume": FINETUNE + ["training.max_steps=4"],
    "hf-dissect recipes": [],
    "hf-dissect recipes quickstart": [],
    "hf-dissect train flickr8k-local data.path=/data/flickr8k": [SCRATCH, *SMALL, "model.max_caption_length=16"],
    "hf-dissect recipes --accelerate": [],
    "hf-dissect recipes --accelerate multi-gpu > multi-gpu.yaml": [],
    "accelerate launch --config_file multi-gpu.yaml -m hf_dissect.cli train cc3m": PAPER,
    "torchrun --nproc-per-node 8 -m hf_dissect.cli train cc3m selection.scope=global": PAPER,
    "hf-dissect train mine.yaml training.per_device_train_batch_size=4096 objective.grad_cache_chunk_size=64": [
        *FINETUNE,
        "objective.grad_cache_chunk_size=4",
    ],
    "hf-dissect train mine.yaml objective.gsc.gamma=0.02 selection.strategy=none": [
        *FINETUNE,
        "objective.gsc.warmup_epochs=0",
    ],
    "hf-dissect evaluate runs/mine": [],
    "hf-dissect evaluate runs/mine --data /data/flickr8k --split validation": [],
    'hf-dissect evaluate runs/mine --data /data/pets --classes cat,dog --template "a photo of a {}."': [],
    "hf-dissect compare quickstart --strategies none,random,dissect,dissect:momentum --seeds 0,1,2"
    " --output-dir runs/four": [*SCENES, "model.max_caption_length=16", "evaluation.zero_shot=null"],
    "hf-dissect push runs/mine USER/mine --private": [],
    "hf-dissect train hub:USER/mine data.path=/data/flickr8k": FINETUNE,
    "hf-dissect evaluate hub:USER/mine --data /data/flickr8k --split validation": [],
    "hf-dissect push-ledger runs/mine USER/mine-scores": [],
    "hf-dissect train mine.yaml selection.ledger=hub:USER/mine-scores selection.warmup_epochs=0": FINETUNE,
    "hf-dissect audit runs/mine": [],
    "hf-dissect audit runs/mine --data /data/flickr8k --export-clean flickr8k-clean --keep 0.8": [],
    "hf-dissect train amid-utd-mhad data.path=/data/utd_mhad": UTD,
    "hf-dissect train amid-utd-mhad data.path=/data/utd_mhad distillation.method=hinton": UTD,
    "hf-dissect train amid-clip data.path=/data/birds": [
        *("student.name_or_path=clip", "auxiliaries.caption.name_or_path=clip", "training.save_strategy=no"),
        *("training.per_device_train_batch_size=8", "training.max_steps=2", "training.use_cpu=true"),
    ],
    "hf-dissect evaluate runs/amid-utd-mhad": [],
    "hf-dissect push runs/amid-utd-mhad USER/student": [],
    "hf-dissect train hub:USER/student data.path=/data/utd_mhad": [],
    "hf-dissect evaluate hub:USER/student --data /data/utd_mhad": [],
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    return [line.removeprefix("$ ") for block in blocks("console") for line in block.splitlines()]


def first_column(heading: str) -> list[str]:
    """The names in code in the first column of the table that begins with `heading`."""
    table = README[README.index(f"\n| {heading} |") + 1 :].split("\n\n")[0].splitlines()[2:]
    return [name for row in table for name in re.findall(r"`([^`]+)`", row.split("|")[1])]


def test_every_fenced_command_is_run_below():
    assert commands() == list(COMMANDS)
    languages = set(re.findall(r"^```(\w*)$", README, flags=re.MULTILINE)) - {""}
    assert languages == {"console", "python", "yaml", "bibtex"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """What the README takes for given: photographs in /data, a model of the Hub, tar shards."""
    place = tmp_path_factory.mktemp("given")
    (place / "flickr8k").mkdir()
    for split in ("train", "validation", "test"):
        make_scenes(24, split=split, captions_per_image=2).to_parquet(place / "flickr8k" / f"{split}.parquet")
    pets = make_scene_classes(6).remove_columns("label").add_column("label", [0, 1] * 3)
    pets.cast_column("label", ClassLabel(names=["cat", "dog"])).to_parquet(place / "pets.parquet")
    (place / "birds").mkdir()
    for split in ("train", "validation", "test"):
        birds = make_scenes(16, split=split).add_column("label", ["wren", "robin"] * 8)
        birds.to_parquet(place / "birds" / f"{split}.parquet")
    np.savez(
        place / "utd_mhad.npz",
        depth=np.zeros((32, 2, 8, 8), np.uint8),
        skeleton=np.ones((32, 4, 20, 3), np.float32),
        inertial=np.ones((32, 4, 6), np.float32),
        action=np.arange(32) // 8,
        subject=np.arange(32) % 8 + 1,
    )
    for part in tiny_models.tiny_clip():
        part.save_pretrained(place / "clip")
    (place / "shards").mkdir()
    with tarfile.open(place / "shards" / "train-0.tar", "w") as tar:
        for number, row in enumerate(make_scenes(32)):
            for suffix, content in (("png", row["image"]["bytes"]), ("txt", row["caption"].encode())):
                member = tarfile.TarInfo(f"{number:03}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return place


@pytest.fixture
def hub():
    """A Hub on this machine."""
    with serving() as running:
        yield running


def test_commands_run_in_the_order_of_the_readme(data, hub, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("clip", "shards"):
        (tmp_path / name).symlink_to(data / name)
    hub_client.use(hub, tmp_path / "huggingface", monkeypatch)
    (recipe,) = blocks("yaml")
    Path("mine.yaml").write_text(recipe.replace("/data/flickr8k", str(data / "flickr8k")))
    for command, added in COMMANDS.items():
        if added is None:
            continue
        words = shlex.split(command.split(" > ")[0])
        words = words[1:] if words[0] == "hf-dissect" else words[words.index("hf_dissect.cli") + 1 :]
        words = [word.replace("/data/flickr8k", str(data / "flickr8k")) for word in words]
        words = [word.replace("/data/pets", str(data / "pets.parquet")) for word in words]
        words = [word.replace("USER/", "ada/") for word in words]
        words = [word.replace("/data/utd_mhad", str(data / "utd_mhad.npz")) for word in words]
        words = [word.replace("/data/birds", str(data / "birds")) for word in words]
        if "--resume" in words:
            shutil.copytree("runs/mine", "before")
        assert main([*words, *added]) == 0, f"{command}: {capsys.readouterr().err}"
    assert {path.name for path in Path("runs").iterdir()} == {
        *("mine", "mine-2", "mine-3", "mine-4", "mine-5", "mine-6", "mine-7", "flickr8k-local", "cc3m", "cc3m-2"),
        *("four", "amid-utd-mhad", "amid-utd-mhad-2", "amid-utd-mhad-3", "amid-clip"),
    }
    steps = [json.loads(Path(folder, "metrics.json").read_text())["steps"] for folder in ("before", "runs/mine")]
    assert steps == [2, 4]
    shown = capsys.readouterr().out
    assert "zero-shot top-1 accuracy" in shown and "dissect:momentum" in shown


@pytest.mark.parametrize("command", [command for command, added in COMMANDS.items() if added is None])
def test_make_targets_exist(command):
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    assert subprocess.run([*command.split(), "-n"], cwd=ROOT, capture_output=True).returncode == 0


def test_the_first_snippet_trains_in_seconds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(blocks("python")[0], "README.md", "exec"), names)
    assert names["trainer"].state.global_step == 3 * 512 // 64
    assert json.loads(Path("runs/x/metrics.json").read_text())["selection"]["kept_share"] == 0.5
    assert Path("runs/x/report.html").is_file()


def test_the_adapter_of_the_second_snippet_is_made_saved_and_loaded(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model, processor = tiny_models.tiny_clip()
    names: dict = {"batch": tiny_models.tiny_inputs(model, processor, tiny_models.CAPTIONS[:4])}
    snippet = blocks("python")[1].replace("openai/clip-vit-base-patch32", str(data / "clip"))
    exec(compile(snippet, "README.md", "exec"), names)
    assert "tensor" in capsys.readouterr().out
    assert torch.equal(names["model"](**names["batch"]).logits_per_text, names["outputs"].logits_per_text)


def test_the_strategy_of_the_third_snippet_trains(tmp_path):
    names: dict = {}
    exec(compile(blocks("python")[2], "README.md", "exec"), names)
    model, processor = tiny_models.tiny_clip()
    args = DissectTrainingArguments(
        str(tmp_path), per_device_train_batch_size=16, max_steps=2, save_run_folder=False, use_cpu=True
    )
    trainer = DissectTrainer(
        model=model,
        processing_class=processor,
        train_dataset=tiny_models.tiny_pairs(32),
        args=args,
        strategy=names["MiddleLoss"](),
    )
    trainer.train()
    assert trainer.monitor.run.figures()["kept_share"] == 0.5
    assert len(blocks("python")) == 3


def test_the_recipe_is_a_recipe():
    recipe = Recipe.from_dict(yaml.safe_load(blocks("yaml")[0].replace("1e-5", "1.0e-5")))
    assert recipe.selection.strategy == "dissect" and recipe.training["per_device_train_batch_size"] == 128


def test_tables_name_what_there_is():
    assert sorted(first_column("name")) == sorted(STRATEGIES)
    assert sorted(first_column("shipped recipe")) == sorted(shipped_recipes())
    sources = README[README.index("| `data.source` |") :].split("\n\n")[0].splitlines()[2:]
    assert [row.split("`")[1] for row in sources] == list(SOURCES)


def test_run_files_are_those_of_a_run():
    named = first_column("in the run folder")
    assert {"recipe.yaml", "metrics.json", "report.html", "ledger.safetensors", "selection.parquet"} <= set(named)


def test_links_within_the_tree_resolve():
    links = re.findall(r"\]\(([^)]+)\)", README)
    headings = ["#" + heading.lower().replace(" ", "-") for heading in re.findall(r"^#+ (.*)$", README, re.MULTILINE)]
    assert all(link in headings for link in links if link.startswith("#"))
    inside = [link for link in links if not link.startswith(("https://", "#"))]
    assert inside and all((ROOT / link).exists() for link in inside)


def test_the_cost_table_follows_from_the_formula():
    rows = re.findall(r"^\| (0\.\d) \| 3 B \| ([\d.]+) B \| ([\d.]+) B \|$", README, flags=re.MULTILINE)
    assert len(rows) == 3
    for ratio, scored, random in rows:
        assert float(scored) == pytest.approx(1 + 3 * float(ratio)) and float(random) == pytest.approx(
            3 * float(ratio)
        )
