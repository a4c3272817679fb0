"""Dense layers of sentence-transformers models: applied as they were trained, saved, frozen, or refused."""

import copy
import json

import pytest
import torch
from testing.tiny_models import CAPTIONS, tiny_picture
from testing.trained_towers import add_sentence_modules, save_text_tower, save_vision_tower
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer

from hf_dissect.models.dual_encoder import DualEncoder, DualEncoderConfig
from hf_dissect.models.families import freeze_tower
from hf_dissect.models.loading import check_same_architecture, load_model_and_processor

TANH = "torch.nn.modules.activation.Tanh"
IDENTITY = "torch.nn.modules.linear.Identity"


def dense(size: int, out: int, activation: str = TANH, **more) -> dict:
    return {"in_features": size, "out_features": out, "bias": True, "activation_function": activation, **more}


def save_sentence_encoder(folder, kind: str, *modules: dict, pooling: str = "pooling_mode_mean_tokens"):
    """Write a sentence-transformers model; return its folder and its linear layers."""
    save_text_tower(folder, kind, sentence_pooling=pooling)
    return str(folder), add_sentence_modules(folder, *modules)


def load(tmp_path, text: str, **settings):
    vision = save_vision_tower(tmp_path / "vision")
    return load_model_and_processor(
        vision={"name_or_path": vision}, text={"name_or_path": text}, projection_dim=12, **settings
    )


def embed(model, processor, captions) -> torch.Tensor:
    texts = processor.tokenizer(captions, padding=True, return_tensors="pt")
    with torch.no_grad():
        return normalize(model.get_text_features(**texts).pooler_output, dim=-1)


@pytest.mark.parametrize(
    ("kind", "modules", "formula"),
    [
        ("bert", [dense(32, 20)], lambda x, first: first(x).tanh()),
        ("t5", [dense(32, 40, IDENTITY, bias=False), {"type": "Normalize"}], lambda x, first: first(x)),
        (
            "mpnet",
            [
                dense(32, 20),
                {"type": "Dropout"},
                dense(20, 8, "torch.nn.modules.activation.GELU", file="pytorch_model.bin"),
            ],
            lambda x, first, second: torch.nn.functional.gelu(second(first(x).tanh())),
        ),
        (
            "bert",
            [{"type": "Normalize"}, dense(32, 9, IDENTITY, module_input_name="sentence_embedding")],
            lambda x, first: first(normalize(x, dim=-1)),
        ),
        ("bert", [{"type": "Normalize"}], lambda x: x),
    ],
)
def test_dense_layers_are_applied_behind_the_pooling(kind, modules, formula, tmp_path):
    text, layers = save_sentence_encoder(tmp_path / "text", kind, *modules)
    model, processor = load(tmp_path, text)
    tokens = AutoTokenizer.from_pretrained(text)(CAPTIONS[:5], padding=True, return_tensors="pt")
    tower = AutoModel.from_pretrained(text).eval()
    tower = tower.get_encoder() if kind == "t5" else tower
    with torch.no_grad():
        states = tower(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
        mask = tokens["attention_mask"][..., None].float()
        pooled = formula((states * mask).sum(1) / mask.sum(1), *layers)
        expected = normalize(model.text_projection(pooled), dim=-1)
    assert model.config.text_size == pooled.shape[1] == model.text_projection.in_features
    torch.testing.assert_close(embed(model, processor, CAPTIONS[:5]), expected, rtol=1e-4, atol=1e-5)
    # They come back, in transformers, as a tower of another model, and in a checkpoint.
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    again = AutoModel.from_pretrained(tmp_path / "saved").eval()
    torch.testing.assert_close(embed(again, processor, CAPTIONS[:5]), expected, rtol=1e-4, atol=1e-5)
    check_same_architecture(again, tmp_path / "saved")
    other, _ = load_model_and_processor(
        vision={"name_or_path": str(tmp_path / "saved")}, text={"name_or_path": str(tmp_path / "saved")}
    )
    assert other.config.text_layers == model.config.text_layers
    with torch.no_grad():
        other.text_projection.weight[:12] = model.text_projection.weight
        found = other.get_text_features(**processor.tokenizer(CAPTIONS[:5], padding=True, return_tensors="pt"))
    torch.testing.assert_close(normalize(found.pooler_output[:, :12], dim=-1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frozen", [True, False])
def test_dense_layers_are_frozen_or_trained_with_the_tower(frozen, tmp_path):
    model, processor = load(tmp_path, save_sentence_encoder(tmp_path / "text", "bert", dense(32, 20))[0])
    if frozen:
        freeze_tower(model, "text")
    before = copy.deepcopy(model.text_model.state_dict())
    assert any(name.startswith("sentence_layers") for name in before)
    pictures = processor.image_processor(images=[tiny_picture(row)[0] for row in range(4)], return_tensors="pt")
    texts = processor.tokenizer(CAPTIONS[:4], padding=True, return_tensors="pt")
    model.train()(**pictures, **texts, return_loss=True).loss.backward()
    layer = model.text_model.sentence_layers[0].linear
    assert (layer.weight.grad is None) == frozen and (layer.bias.grad is None) == frozen
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert torch.equal(before["sentence_layers.0.linear.weight"], layer.weight) == frozen


def test_a_model_without_dense_layers_is_saved_as_before(tmp_path):
    model, _ = load(tmp_path, save_text_tower(tmp_path / "text", sentence_pooling="pooling_mode_cls_token"))
    model.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config.pop("text_layers", None) is None
    (tmp_path / "saved" / "config.json").write_text(json.dumps(config))  # as an earlier version wrote it
    assert type(AutoModel.from_pretrained(tmp_path / "saved")) is DualEncoder


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (
            {"type": "LayerNorm", "dimension": 32},
            "'2_LayerNorm' of its modules.json is a LayerNorm, which is not offered",
        ),
        ({"type": "WeightedLayerPooling"}, "WeightedLayerPooling, which is not offered; name another text model"),
        (dense(32, 8, "my.package.Swish"), "has the activation my.package.Swish; offered: Identity, Tanh"),
        (dense(32, 8, "torch.nn.modules.activation.PReLU"), "PReLU; offered"),
        (dense(32, 8, module_output_name="token_embeddings"), "is not for the embedding of the whole text"),
        (dense(32, 8, use_residual=True), "has use_residual, which is not offered"),
        (dense(31, 8), "does not encode captions: RuntimeError"),
        (dense(32, 8, file="weights.safetensors"), r"has no weights .model.safetensors or pytorch_model.bin"),
    ],
)
def test_what_cannot_be_applied_is_refused(module, message, tmp_path):
    text, _ = save_sentence_encoder(tmp_path / "text", "bert", module)
    with pytest.raises(ValueError, match=f"model.text.name_or_path .*{message}"):
        load(tmp_path, text)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json; the copy is incomplete"),
        (lambda folder: (folder / "config.json").write_text("[]"), "not that of a dense layer"),
        (lambda folder: (folder / "config.json").write_text('{"in_features": 32}'), "not that of a dense layer"),
        (lambda folder: (folder / "config.json").write_text(json.dumps(dense(32, 9))), "of a dense layer do not fit"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 20), "weights that cannot be read"),
    ],
)
def test_a_damaged_copy_is_refused(break_it, message, tmp_path):
    text, _ = save_sentence_encoder(tmp_path / "text", "bert", dense(32, 20))
    break_it(tmp_path / "text" / "2_Dense")
    with pytest.raises(ValueError, match=message):
        load(tmp_path, text)


@pytest.mark.parametrize(
    "layers",
    [
        [{"in_features": 4}],
        ["dense"],
        [{"in_features": 4, "out_features": 0, "bias": True, "activation": "Tanh"}],
        [{"in_features": 4, "out_features": 3, "bias": True, "activation": "Module"}],
        [{"in_features": 4, "out_features": size, "bias": True, "activation": "Tanh"} for size in (3, 2)],
    ],
)
def test_impossible_settings_of_layers_are_refused(layers):
    features = {"model_type": "precomputed_features", "hidden_size": 4}
    with pytest.raises(ValueError, match="text_layers"):
        DualEncoderConfig(vision_config=features, text_config=features, text_layers=layers)
