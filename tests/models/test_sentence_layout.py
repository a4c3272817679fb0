"""Models that sentence-transformers saved, in its old and its new layout, and those that are no dual encoder."""

import json
from pathlib import Path

import pytest
import torch
from testing.tiny_models import tiny_clip

from hf_dissect.models.loading import load_model_and_processor
from hf_dissect.models.sentence_layout import find_encoder_folder


def save(folder: Path, place: str, *kinds: str) -> Path:
    """Write a CLIP model and its processor, and the list of the modules."""
    for part in tiny_clip():
        part.save_pretrained(folder / place)
    modules = [
        {
            "idx": number,
            "name": str(number),
            "path": f"{number}_{kind}" if number else place,
            "type": f"x.models.{kind}",
        }
        for number, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    return folder


@pytest.mark.parametrize(
    ("place", "kinds"),
    [
        ("0_CLIPModel", ["CLIPModel"]),
        ("", ["CLIPModel", "Normalize"]),
        ("", ["Transformer"]),
        ("0_T", ["Transformer"]),
    ],
)
def test_the_encoder_is_found(place, kinds, tmp_path):
    folder = save(tmp_path, place, *kinds)
    model, processor = load_model_and_processor(name_or_path=str(folder))
    expected = tiny_clip()[0].state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())
    assert processor.tokenizer.model_max_length == 16
    assert find_encoder_folder(str(folder)) == str(folder / place if place else folder)


@pytest.mark.parametrize(
    ("kinds", "match"),
    [
        (["CLIPModel", "Dense"], "with Dense behind its encoder"),
        (["Transformer", "Normalize", "LayerNorm"], "with LayerNorm behind"),
        (["Router"], "begins with Router; a dual encoder begins with CLIPModel or Transformer"),
        (["WordEmbeddings", "Pooling"], "begins with WordEmbeddings"),
    ],
)
def test_weights_that_would_be_left_out_are_named(kinds, match, tmp_path):
    with pytest.raises(ValueError, match=f"{match}.*[Nn]ame the model from which it was made"):
        load_model_and_processor(name_or_path=str(save(tmp_path, "", *kinds)))


@pytest.mark.parametrize("content", ["[]", "{}", "[1]", '[{"type": "CLIPModel"}]', "[{", '[{"type": 1, "path": ""}]'])
def test_a_damaged_list_of_modules_is_named(content, tmp_path):
    folder = save(tmp_path, "", "CLIPModel")
    (folder / "modules.json").write_text(content)
    with pytest.raises(OSError, match="modules.json cannot be read as that of sentence-transformers.*again"):
        load_model_and_processor(name_or_path=str(folder))


def test_a_folder_outside_or_absent_is_refused(tmp_path):
    folder = save(tmp_path, "0_CLIPModel", "CLIPModel")
    for place, error, match in (
        ("../other", ValueError, "outside of it"),
        ("/etc", ValueError, "outside of it"),
        ("1_CLIPModel", OSError, "'1_CLIPModel', which is missing"),
    ):
        (folder / "modules.json").write_text(json.dumps([{"path": place, "type": "x.CLIPModel"}]))
        with pytest.raises(error, match=match):
            load_model_and_processor(name_or_path=str(folder))


def test_a_repository_of_the_hub_in_the_old_layout(hub, tmp_path, monkeypatch):
    folder = save(tmp_path / "saved", "0_CLIPModel", "CLIPModel")
    for path in folder.rglob("*"):
        if path.is_file():
            hub.add_file("eve/clip", path.relative_to(folder).as_posix(), path.read_bytes())
    model, _ = load_model_and_processor(name_or_path="eve/clip")
    assert torch.equal(model.logit_scale, tiny_clip()[0].logit_scale)
