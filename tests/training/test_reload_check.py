"""Before training, a warning says if the saved files would give another model than the one that trains."""

import logging
import random

import numpy as np
import pytest
import torch
from datasets import IterableDataset
from peft import AdaLoraConfig, IA3Config, LNTuningConfig, LoraConfig, get_peft_model
from testing import tiny_models
from testing.tiny_models import tiny_inputs, tiny_pairs, with_mola
from transformers import BertConfig, BertModel, CLIPModel

from hf_dissect import DissectTrainer, DissectTrainingArguments, TwinDualEncoder, load_model_and_processor
from hf_dissect.report.live import LIVE_FILES

SETTINGS = dict(
    per_device_train_batch_size=16,
    learning_rate=1e-3,
    max_steps=1,
    selection_strategy="none",
    save_strategy="no",
    save_run_folder=False,
    report_to="none",
    disable_tqdm=True,
    use_cpu=True,
)


def make_trainer(model, processor, folder, data=None, **settings):
    return DissectTrainer(
        model=model,
        processing_class=processor,
        train_dataset=tiny_pairs(32) if data is None else data,
        args=DissectTrainingArguments(str(folder), **{**SETTINGS, **settings}),
    )


def train(model, processor, folder, caplog, **settings):
    """Train, and return what the check warns of; empty without a warning."""
    caplog.clear()
    with caplog.at_level(logging.INFO, "hf_dissect.training.reload_check"):
        make_trainer(model, processor, folder, **settings).train()
    records = [record for record in caplog.records if record.name.endswith("reload_check")]
    warnings = [record.getMessage() for record in records if record.levelno >= logging.WARNING]
    assert len(warnings) <= 1
    if not warnings and settings.get("check_reload", True):
        assert [record.getMessage()[:40] for record in records] == ["Saving and loading the model was checked"]
    return "".join(warnings)


def lora(model, **fields):
    return get_peft_model(model, LoraConfig(r=2, **{"target_modules": ["q_proj", "query"], **fields}))


def injected(model):
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="mine")
    return model


def twins(model):
    return TwinDualEncoder.of(model, tiny_models.tiny_clip(seed=1)[0])


SOUND = {
    "lora": lora,
    "lora with all biases": lambda model: lora(model, bias="all"),
    "dora": lambda model: lora(model, use_dora=True),
    "lora with saved modules": lambda model: lora(model, modules_to_save=["visual_projection", "layernorm"]),
    "lora with tokens": lambda model: lora(model, trainable_token_indices={"token_embedding": [1, 2]}),
    "lora on parameters and embeddings": lambda model: lora(model, target_modules=["q_proj", "token_embedding"]),
    "adalora": lambda model: get_peft_model(model, AdaLoraConfig(target_modules=["q_proj"], total_step=9)),
    "ia3": lambda model: get_peft_model(model, IA3Config(target_modules=["k_proj"], feedforward_modules=[])),
    "norms": lambda model: get_peft_model(model, LNTuningConfig(target_modules=["layer_norm1"])),
    "mola grad": lambda model: with_mola(model, "grad", default_task=0),
    "mola router": lambda model: with_mola(model, train_logit_scale=True),
    "mola with its base": lambda model: with_mola(model, train_base="all"),
    "injected": injected,
    "twins": twins,
}


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_a_model_of_a_known_family_comes_back(family, tmp_path, caplog):
    assert train(*getattr(tiny_models, family)(), tmp_path / "run", caplog) == ""
    assert {path.name for path in (tmp_path / "run").iterdir()} == {*LIVE_FILES}


@pytest.mark.parametrize("kind", list(SOUND))
@pytest.mark.parametrize("named", [False, True])
def test_an_adapter_comes_back(kind, named, tmp_path, caplog):
    model, processor = tiny_models.tiny_clip()
    if named:
        for part in (model, processor):
            part.save_pretrained(tmp_path / "base")
        model, _ = load_model_and_processor(name_or_path=str(tmp_path / "base"))
    assert train(SOUND[kind](model), processor, tmp_path / "run", caplog) == ""


class MeanBert(BertModel):
    """BERT whose pooled output is the mean of its tokens."""

    def forward(self, *args, attention_mask=None, **kwargs):
        output = super().forward(*args, attention_mask=attention_mask, **kwargs)
        output.pooler_output = output.last_hidden_state.mean(1)
        return output


def dual_encoder_of_means():
    model, processor = tiny_models.tiny_dual_encoder()
    text = MeanBert(BertConfig(**model.text_model.config.to_dict()))
    text.load_state_dict(model.text_model.state_dict())
    model.text_model = text.eval()
    return model, processor


def test_a_subclass_that_loads_as_its_parent_is_named_with_the_difference(tmp_path, caplog):
    model, processor = dual_encoder_of_means()
    warning = train(model, processor, tmp_path / "run", caplog)
    assert "text_model is a MeanBert and is loaded as BertModel" in warning and "check_reload=False" in warning
    # The number is the largest distance of the embeddings of the first pairs.
    inputs = make_trainer(model, processor, tmp_path / "run").data_collator(
        [{**row, "sample_id": 0} for row in tiny_pairs(4)]
    )
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    start, _ = dual_encoder_of_means()
    plain, _ = tiny_models.tiny_dual_encoder()
    with torch.no_grad():
        own, other = (part(**inputs).text_embeds for part in (start, plain))
    assert f"differ by {(own - other).norm(dim=-1).max().item():.3g} from" in warning


def test_the_setting_switches_the_check_off(tmp_path, caplog):
    assert train(*dual_encoder_of_means(), tmp_path / "run", caplog, check_reload=False) == ""


def replace_forward(model):
    tower, forward = model.text_model, model.text_model.forward

    def doubled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.pooler_output = output.pooler_output.flip(-1)
        return output

    tower.forward = doubled
    return model


def replace_features(model):
    features = model.get_image_features

    def flipped(**inputs):
        output = features(**inputs)
        output.pooler_output = output.pooler_output.flip(-1)
        return output

    model.get_image_features = flipped
    return model


class Gated(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.gate = inner, torch.nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return self.inner(x) + self.gate * x


def add_gate(model):
    model.text_projection = Gated(model.text_projection)
    return model


def turn_positions(model):
    embeddings = model.text_model.embeddings
    embeddings.position_ids = embeddings.position_ids.flip(-1)
    return model


def tie_projections(model):
    model.text_projection.weight = model.visual_projection.weight
    return model


def named_adapter(model):
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="mine")


LOST = {
    "forward replaced": (replace_forward, "forward of text_model is replaced on the object"),
    "features replaced": (replace_features, "embeddings by get_image_features differ"),
    "a module that has no effect yet": (add_gate, r"text_projection.gate"),
    "a buffer that is not saved": (turn_positions, "text_embeds differ by"),
    "weights tied by hand": (tie_projections, "the model cannot be saved"),
    "an adapter with a name": (named_adapter, "leave adapter_name at its default"),
}


@pytest.mark.parametrize("change", list(LOST))
def test_whatever_is_lost_is_reported(change, tmp_path, caplog):
    model, processor = tiny_models.tiny_clip()
    apply, expected = LOST[change]
    assert expected in train(apply(model), processor, tmp_path / "run", caplog)


def test_a_method_replaced_on_a_class_is_reported_although_this_process_has_it(tmp_path, caplog, monkeypatch):
    features = CLIPModel.get_text_features

    def flipped(self, **inputs):
        output = features(self, **inputs)
        output.pooler_output = output.pooler_output.flip(-1)
        return output

    monkeypatch.setattr(CLIPModel, "get_text_features", flipped)
    warning = train(*tiny_models.tiny_clip(), tmp_path / "run", caplog)
    assert "get_text_features of CLIPModel is replaced on the class" in warning


@pytest.mark.parametrize("injects", [False, True])
def test_a_base_that_is_not_the_named_one_is_reported(injects, tmp_path, caplog):
    model, processor = tiny_models.tiny_clip()
    model.save_pretrained(tmp_path / "base")
    model, _ = tiny_models.tiny_clip(seed=3)
    model.name_or_path = str(tmp_path / "base")
    warning = train(injected(model) if injects else lora(model), processor, tmp_path / "run", caplog)
    assert "differ by" in warning and "save the base as it is now" in warning


def test_weights_of_a_named_base_that_train_are_reported(tmp_path, caplog):
    for part in tiny_models.tiny_clip():
        part.save_pretrained(tmp_path / "base")
    model, processor = load_model_and_processor(name_or_path=str(tmp_path / "base"))
    model = lora(model)
    model.base_model.model.logit_scale.requires_grad_(True)
    warning = train(model, processor, tmp_path / "run", caplog)
    assert "train and are not saved, or not loaded: logit_scale;" in warning and "modules_to_save" in warning


def draw_rows():
    for row in tiny_pairs(32):
        yield {**row, "number": random.random() + np.random.rand()}


@pytest.mark.parametrize("streams", [False, True])
def test_the_check_leaves_no_trace_in_the_run(streams, tmp_path):
    weights = []
    for checks in (True, False):
        model, processor = tiny_models.tiny_align()
        data = IterableDataset.from_generator(draw_rows) if streams else tiny_pairs(32)
        settings = {"max_steps": 3, "check_reload": checks, "selection_strategy": "random", "selection_ratio": 0.5}
        trainer = make_trainer(model, processor, tmp_path / str(checks), data=data, **settings)
        trainer.train()
        weights.append(
            {**trainer.model.state_dict(), "random": torch.rand(3), "numpy": torch.tensor(np.random.rand())}
        )
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_check_never_ends_a_run(tmp_path, caplog, monkeypatch):
    model, processor = tiny_models.tiny_clip()
    trainer = make_trainer(model, processor, tmp_path / "run")
    collate, calls = trainer.data_collator, []

    def fail_once(*args, **kwargs):
        calls.append(args)
        if len(calls) == 1:
            raise RuntimeError("no space left")
        return save(*args, **kwargs)

    save = model.save_pretrained
    monkeypatch.setattr(model, "save_pretrained", fail_once)
    with caplog.at_level(logging.INFO, "hf_dissect.training.reload_check"):
        trainer.train()
    assert "the model cannot be saved (RuntimeError: no space left)" in caplog.text
    assert collate is trainer.data_collator and trainer.state.global_step == 1


def test_a_model_of_another_library_is_reported(tmp_path, caplog):
    model, processor = tiny_models.tiny_clip()

    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.clip, self.config = model, model.config
            self.get_image_features, self.get_text_features = model.get_image_features, model.get_text_features

        def forward(self, input_ids=None, attention_mask=None, pixel_values=None):
            return self.clip(input_ids=input_ids, attention_mask=attention_mask, pixel_values=pixel_values)

    assert "Own is not a transformers.PreTrainedModel" in train(Own(), processor, tmp_path / "run", caplog)


def test_half_precision_and_mixed_precision_give_no_false_alarm(tmp_path, caplog):
    model, processor = tiny_models.tiny_clip()
    assert train(model, processor, tmp_path / "mixed", caplog, bf16=True) == ""
    inputs = tiny_inputs(model, processor, tiny_models.CAPTIONS[:4])
    assert model.bfloat16().eval()(**{**inputs, "pixel_values": inputs["pixel_values"].bfloat16()}) is not None
