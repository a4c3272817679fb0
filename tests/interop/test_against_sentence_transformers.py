"""Run folders in sentence-transformers: the embeddings of pictures and captions are those of ours."""

import json

import pytest
import torch
from testing import tiny_models
from testing.tiny_models import CAPTIONS, bert_tokenizer, square_image_processor, tiny_clip, tiny_inputs, tiny_picture
from testing.tiny_recipe import tiny_recipe
from transformers import BertConfig, BertModel, VisionTextDualEncoderProcessor, ViTConfig, ViTModel

from hf_dissect import TwinDualEncoder
from hf_dissect.hub.push import push_run
from hf_dissect.interop.export import export_run
from hf_dissect.interop.sentence_files import write_sentence_files
from hf_dissect.models.adapters import save_base
from hf_dissect.models.dual_encoder import DualEncoder
from hf_dissect.models.loading import load_model_and_processor
from hf_dissect.runs.run import run_recipe

SentenceTransformer = pytest.importorskip("sentence_transformers").SentenceTransformer
TOLERANCE = 1e-5
TEXTS = [*CAPTIONS[:4], "red " * 60, "", "a"]
PICTURES = [tiny_picture(number)[0] for number in range(4)]


def save(folder, model, processor):
    """Write a folder as a run does, with weights of the adapter that are not zero."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ("lora" in name or "mola_" in name):
            torch.nn.init.normal_(parameter, std=0.3)
    for part in (model, processor):
        part.save_pretrained(folder)
    save_base(model, folder)
    write_sentence_files(folder, model, processor)
    return folder


def compare(folder, task=None, **given):
    """Check the embeddings of a folder, or of a repository, and return the model of sentence-transformers."""
    model, processor = load_model_and_processor(name_or_path=str(folder))
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    inputs = tiny_inputs(bare, processor, TEXTS)
    tasks = {} if task is None else {"task_ids": torch.full((len(TEXTS),), task)}
    if task is not None:  # a row of pictures for each caption, as tasks belong to pairs
        inputs["pixel_values"] = inputs["pixel_values"].repeat(2, 1, 1, 1)[: len(TEXTS)]
    with torch.no_grad():
        outputs = model(**inputs, **tasks)
    theirs = SentenceTransformer(str(folder), device="cpu", **given)
    for mine, other in (
        (outputs.image_embeds[: len(PICTURES)], theirs.encode(PICTURES, convert_to_tensor=True)),
        (outputs.text_embeds, theirs.encode(TEXTS, convert_to_tensor=True)),
    ):
        torch.testing.assert_close(other, mine, atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(other.norm(dim=-1), torch.ones(len(other)))
        assert theirs.get_embedding_dimension() == other.shape[1]
    return theirs


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_every_family_and_its_lora_load_as_they_are(family, tmp_path):
    model, processor = getattr(tiny_models, family)()
    compare(save(tmp_path / "run", model, processor))
    if family != "tiny_align":
        model.name_or_path = str(tmp_path / "run")
        compare(save(tmp_path / "lora", tiny_models.with_lora(model), processor))


def test_a_run_and_its_repository_load(hub, tmp_path):
    run_recipe(tiny_recipe(tmp_path / "run", evaluation={"zero_shot": None}))
    compare(tmp_path / "run")
    push_run(tmp_path / "run", "ada/tiny")
    compare("ada/tiny")


def test_what_needs_code_of_ours_loads_when_it_is_trusted(tmp_path):
    model, processor = tiny_clip()
    lora = save(tmp_path / "lora", tiny_models.with_lora(model), processor)
    compare(lora, trust_remote_code=True)
    with pytest.raises(ValueError, match="(?s)hf_dissect.*trust_remote_code=True"):
        SentenceTransformer(str(lora))
    compare(export_run(lora, tmp_path / "merged", "sentence-transformers"))
    router = save(tmp_path / "router", tiny_models.with_mola(tiny_clip()[0]), processor)
    compare(router, trust_remote_code=True)
    twins = TwinDualEncoder.of(tiny_clip(0)[0], tiny_clip(1)[0])
    compare(save(tmp_path / "twins", twins, processor), trust_remote_code=True)


def test_two_towers_load_when_they_are_trusted(tmp_path):
    tokenizer = bert_tokenizer()
    text = BertModel(BertConfig(**tiny_models._text_config(tokenizer)))
    vision = ViTModel(ViTConfig(**tiny_models._vision_config()))
    model = DualEncoder.of(vision, text, vision_size=32, text_size=32, projection_dim=16).eval()
    processor = VisionTextDualEncoderProcessor(square_image_processor(), tokenizer)
    compare(save(tmp_path / "towers", model, processor), trust_remote_code=True)


def test_the_experts_of_a_task_answer(tmp_path):
    model, processor = tiny_clip()
    run = save(tmp_path / "mola", tiny_models.with_mola(model, "grad"), processor)
    (run / "tasks.json").write_text('["birds", "cars"]')
    for number, task in enumerate(["birds", "cars"]):
        compare(run, number, trust_remote_code=True, model_kwargs={"task": task})
        exported = compare(export_run(run, tmp_path / task, "sentence-transformers", task=task))
        trusted = SentenceTransformer(str(run), trust_remote_code=True, model_kwargs={"task": task}, device="cpu")
        torch.testing.assert_close(
            exported.encode(PICTURES, convert_to_tensor=True),
            trusted.encode(PICTURES, convert_to_tensor=True),
            atol=TOLERANCE,
            rtol=0,
        )
    with pytest.raises(ValueError, match="task is missing.*birds, cars; choose one"):
        SentenceTransformer(str(run), trust_remote_code=True)
    with pytest.raises(ValueError, match="task='dogs'.*birds, cars"):
        SentenceTransformer(str(run), trust_remote_code=True, model_kwargs={"task": "dogs"})


def test_what_sentence_transformers_saves_is_a_model_of_ours(tmp_path):
    old = tmp_path / "old"
    for part in tiny_clip():
        part.save_pretrained(old / "0_CLIPModel")
    kind = "sentence_transformers.models.CLIPModel"
    (old / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "0_CLIPModel", "type": kind}]))
    run = save(tmp_path / "run", *tiny_clip())
    for number, source in enumerate((old, run)):
        loaded = SentenceTransformer(str(source), device="cpu")
        loaded.save_pretrained(str(tmp_path / f"saved-{number}"))
        model, processor = load_model_and_processor(name_or_path=str(tmp_path / f"saved-{number}"))
        expected = tiny_clip()[0].state_dict()
        assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())
        theirs = torch.nn.functional.normalize(loaded.encode(TEXTS, convert_to_tensor=True), dim=-1)
        with torch.no_grad():
            mine = model(**tiny_inputs(model, processor, TEXTS)).text_embeds
        torch.testing.assert_close(theirs, mine, atol=TOLERANCE, rtol=0)
