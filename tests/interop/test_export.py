"""Export of runs: merged, whole or not at all, and back again, without the packages of others."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from testing.open_clip_folders import changed
from testing.tiny_models import CAPTIONS, tiny_clip, tiny_dual_encoder, tiny_inputs, with_lora, with_mola
from transformers import AutoModel

from hf_dissect.cli import main
from hf_dissect.interop.export import export_run, write_whole
from hf_dissect.interop.sentence_files import OWN_ENCODER, write_sentence_files
from hf_dissect.models.adapters import save_base
from hf_dissect.models.loading import load_model_and_processor

TOLERANCE = 1e-5


def save(folder: Path, model, processor) -> Path:
    """Write a folder as a run does."""
    folder.mkdir(parents=True)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ("lora" in name or "mola_" in name):
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    save_base(model, folder)
    write_sentence_files(folder, model, processor)
    return folder


def embed(folder: Path, task: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    model, processor = load_model_and_processor(name_or_path=str(folder))
    given = {} if task is None else {"task_ids": torch.full((4,), task)}
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    inputs = tiny_inputs(bare, processor, [*CAPTIONS[:2], "red " * 40, ""])
    with torch.no_grad():
        outputs = model(**inputs, **given)
    return outputs.image_embeds, outputs.text_embeds


def assert_alike(one, other):
    for mine, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(mine, theirs, atol=TOLERANCE, rtol=0)


def types(folder: Path) -> list[str]:
    return [module["type"] for module in json.loads((folder / "modules.json").read_text())]


def left_behind(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_a_model_for_open_clip_comes_back_the_same(tmp_path):
    run = save(tmp_path / "run", *tiny_clip())
    folder = export_run(run, tmp_path / "exported", "open_clip")
    assert {path.name for path in folder.iterdir()} == {
        *("open_clip_config.json", "open_clip_model.safetensors", "tokenizer.json", "tokenizer_config.json")
    }
    assert_alike(embed(run), embed(folder))
    there, back = (load_model_and_processor(name_or_path=str(place)) for place in (run, folder))
    for name, weight in there[0].state_dict().items():
        assert torch.equal(weight, back[0].state_dict()[name]), name
    assert back[0].name_or_path == "" and back[1].tokenizer.model_max_length == 16
    again = export_run(folder, tmp_path / "again", "open_clip")  # a folder of open_clip is a model, too
    assert (again / "open_clip_model.safetensors").read_bytes() == (
        folder / "open_clip_model.safetensors"
    ).read_bytes()


def test_captions_are_cut_where_the_run_cut_them(tmp_path):
    model, processor = tiny_clip()
    processor.tokenizer.model_max_length = 6
    run = save(tmp_path / "run", model, processor)
    folder = export_run(run, tmp_path / "exported", "open_clip", repo_id="ada/birds")
    text = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
    assert (text["context_length"], text["hf_tokenizer_name"]) == (6, "ada/birds")
    assert_alike(embed(run), embed(folder))


@pytest.mark.parametrize("format", ["open_clip", "sentence-transformers"])
def test_an_adapter_is_merged(format, tmp_path):
    model, processor = tiny_clip()
    run = save(tmp_path / "run", with_lora(model), processor)
    folder = export_run(run, tmp_path / "exported", format)
    assert not (folder / "adapter_config.json").exists()
    assert_alike(embed(run), embed(folder))
    assert abs(embed(run)[0] - embed(save(tmp_path / "base", *tiny_clip()))[0]).max() > 0.01
    if format == "sentence-transformers":
        assert AutoModel.from_pretrained(folder).config.model_type == "clip" and OWN_ENCODER not in types(folder)


def test_the_experts_of_a_task_are_merged(tmp_path, capsys):
    model, processor = tiny_clip()
    run = save(tmp_path / "run", with_mola(model, "grad"), processor)
    (run / "tasks.json").write_text('["birds", "cars"]')
    for number, name in enumerate(["birds", "cars"]):
        for format in ("open_clip", "sentence-transformers"):
            folder = tmp_path / f"{name}-{format}"
            assert main(["export", str(run), str(folder), "--format", format, "--task", name]) == 0
            assert_alike(embed(run, number), embed(folder))
    assert_alike(embed(export_run(run, tmp_path / "1", "open_clip", task="1")), embed(tmp_path / "cars-open_clip"))
    assert abs(embed(tmp_path / "birds-open_clip")[0] - embed(tmp_path / "cars-open_clip")[0]).max() > 1e-3
    for task in ([], ["--task", "dogs"], ["--task", "2"], ["--task", "-1"]):
        capsys.readouterr()
        words = ["export", str(run), str(tmp_path / "no"), "--format", "open_clip", *task[:1]]
        words = [*words[:-1], f"--task={task[1]}"] if task else words
        assert main(words) == 2
        assert "an expert for each of the tasks birds, cars; choose one" in capsys.readouterr().err
    assert not (tmp_path / "no").exists() and left_behind(tmp_path) == []


def test_what_cannot_be_merged_is_refused(tmp_path):
    model, processor = tiny_clip()
    run = save(tmp_path / "router", with_mola(model, "router"), processor)
    for format in ("open_clip", "sentence-transformers"):
        with pytest.raises(ValueError, match="has a router: its weights depend on the input and cannot be merged"):
            export_run(run, tmp_path / "no", format)
    plain = save(tmp_path / "plain", *tiny_clip())
    with pytest.raises(ValueError, match="task='birds': the model has no experts by task"):
        export_run(plain, tmp_path / "no", "open_clip", task="birds")
    assert not (tmp_path / "no").exists() and left_behind(tmp_path) == []


def test_other_architectures_are_refused_by_name(tmp_path):
    run = save(tmp_path / "run", *tiny_dual_encoder())
    with pytest.raises(ValueError, match="run cannot be exported to open_clip: .*'vision-text-dual-encoder'"):
        export_run(run, tmp_path / "no", "open_clip")
    assert not (tmp_path / "no").exists()
    assert_alike(embed(run), embed(export_run(run, tmp_path / "yes", "sentence-transformers")))


def test_a_folder_that_is_taken_stays_as_it_is(tmp_path, capsys):
    run = save(tmp_path / "run", *tiny_clip())
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("mine")
    assert main(["export", str(run), str(taken), "--format", "open_clip"]) == 2
    assert "taken is not empty; name a new folder" in capsys.readouterr().err
    assert [path.name for path in taken.iterdir()] == ["thesis.txt"]
    with pytest.raises(ValueError, match="not empty"):
        export_run(run, taken / "thesis.txt", "open_clip")
    (tmp_path / "empty").mkdir()
    assert export_run(run, tmp_path / "empty", "open_clip").is_dir()
    with pytest.raises(ValueError, match="format must be one of sentence-transformers, open_clip, got 'onnx'"):
        export_run(run, tmp_path / "no", "onnx")
    assert main(["export", str(tmp_path / "nothing"), str(tmp_path / "no"), "--format", "open_clip"]) == 2
    assert "no such local folder" in capsys.readouterr().err


def test_a_folder_is_written_whole_or_not_at_all(tmp_path):
    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(tmp_path / "a" / "b", fail)
    assert list((tmp_path / "a").iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:2000]), "open_clip_model.safetensors is damaged or cut off"),
        (lambda file: file.write_bytes(b""), "open_clip_model.safetensors is damaged or cut off"),
        (lambda file: file.unlink(), "no weights .*open_clip_pytorch_model.bin"),
        (
            lambda file: file.rename(file.with_name("open_clip_pytorch_model.bin")),
            "open_clip_pytorch_model.bin is dam",
        ),
    ],
)
def test_damaged_weights_are_named(damage, match, tmp_path):
    folder = export_run(save(tmp_path / "run", *tiny_clip()), tmp_path / "exported", "open_clip")
    damage(folder / "open_clip_model.safetensors")
    with pytest.raises(OSError, match=f"{match}.*(again|them, too)"):
        load_model_and_processor(name_or_path=str(folder))


@pytest.mark.parametrize(
    ("sections", "match"),
    [
        ({"vision_cfg": {"layers": 3}}, "lack visual.transformer.resblocks.2.* and 11 more"),
        ({"vision_cfg": {"layers": 1}}, "have visual.transformer.resblocks.1.* which the configuration"),
        ({"vision_cfg": {"image_size": 64}}, r"visual.positional_embedding \[5, 32\], .* asks for \[17, 32\]"),
        ({"embed_dim": 16}, r"\[32, 32\], where the configuration asks for \[32, 16\]"),
        ({"text_cfg": {"vocab_size": 600}}, r"token_embedding.weight \[588, 32\]"),
    ],
)
def test_weights_of_another_model_are_refused(sections, match, tmp_path):
    folder = export_run(save(tmp_path / "run", *tiny_clip()), tmp_path / "exported", "open_clip")
    file = folder / "open_clip_config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"model_cfg": changed(content["model_cfg"], **sections)}))
    with pytest.raises(ValueError, match=match):
        load_model_and_processor(name_or_path=str(folder))


def test_an_adapter_on_a_model_of_open_clip_is_saved_with_its_base(tmp_path):
    folder = export_run(save(tmp_path / "run", *tiny_clip()), tmp_path / "exported", "open_clip")
    model, processor = load_model_and_processor(name_or_path=str(folder))
    run = save(tmp_path / "lora", get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])), processor)
    assert (run / "base_model" / "model.safetensors").is_file() and types(run)[0] == OWN_ENCODER
    assert_alike(embed(run), embed(export_run(run, tmp_path / "merged", "open_clip")))
