"""Models, captions and pictures against open_clip itself, in both directions."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from testing.open_clip_folders import CLIP, SIGLIP, SIGLIP_TOWER, changed, write_folder
from testing.tiny_models import CAPTIONS, siglip_tokenizer, tiny_clip
from transformers import SiglipModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from hf_dissect.interop.export import export_run
from hf_dissect.models.loading import find_text_padding, load_model_and_processor
from hf_dissect.models.open_clip.siglip_towers import SIGLIP_TOWERS, SiglipTower

open_clip = pytest.importorskip("open_clip")
timm_models = pytest.importorskip("timm.models")

TOLERANCE = 1e-5
# Lengths of which half of the cut is a whole number, where both libraries cut the same part.
SIZES = [(32, 32), (40, 60), (91, 33), (200, 37), (20, 24)]
PICTURES = [
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8))
    for number, size in enumerate(SIZES)
]
TEXTS = [
    *CAPTIONS[:3],
    "The  RED circle,\n on the LEFT!",
    "naïve café 東京 😀 o'clock you'll 1234",
    "red " * 100,
    "",
    " ",
]


@timm_models.register_model
def vit_tiny_patch8_siglip_32(pretrained: bool = False, **given):
    sizes = {"patch_size": 8, "img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2, "class_token": False}
    return timm_models.vision_transformer._create_vision_transformer(
        SIGLIP_TOWER, pretrained=pretrained, **{**sizes, "global_pool": "map", **given}
    )


@pytest.fixture(autouse=True)
def tower(monkeypatch):
    monkeypatch.setitem(SIGLIP_TOWERS, SIGLIP_TOWER, SiglipTower(32, 2, 2, 128, 8, 32, "gelu"))


def compare(folder, model, processor, pictures=PICTURES, pixels=0.0):
    """Check that a folder in open_clip gives the pixels and embeddings of a model here."""
    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer, theirs = open_clip.get_tokenizer(f"local-dir:{folder}"), theirs.eval()
    prepared = torch.stack([preprocess(picture) for picture in pictures])
    ours = processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
    assert abs(prepared - ours).max() <= pixels
    tokens = processor.tokenizer(TEXTS, padding=find_text_padding(model), truncation=True, return_tensors="pt")
    with torch.no_grad():
        pairs = [
            (theirs.encode_image(prepared), model.get_image_features(pixel_values=prepared).pooler_output),
            (theirs.encode_text(tokenizer(TEXTS)), model.get_text_features(**tokens).pooler_output),
        ]
    for one, other in pairs:
        torch.testing.assert_close(F.normalize(one), F.normalize(other), atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(one, other, atol=TOLERANCE * 10, rtol=1e-4)
    assert theirs.logit_scale == model.logit_scale
    assert theirs.logit_bias is None or theirs.logit_bias == model.logit_bias


@pytest.mark.parametrize(
    ("model", "preprocess"),
    [
        (changed(CLIP, quick_gelu=True), {}),
        (CLIP, {"resize_mode": "squash", "interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.5] * 3}),
        (changed(CLIP, vision_cfg={"act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 1e-6}}), {}),
        (changed(CLIP, custom_text=True, nonscalar_logit_scale=True, text_cfg={"context_length": 20}), {}),
        (
            changed(CLIP, vision_cfg={"pos_embed_type": "sin_cos_2d", "patch_dropout": 0.5}),
            {"interpolation": "random"},
        ),
        (changed(CLIP, text_cfg={"pool_type": "eos", "eos_id": 49407, "mlp_ratio": 3.7}), {}),
        (changed(CLIP, text_cfg={"tokenizer_kwargs": {"clean": "canonicalize"}}), {}),
    ],
)
def test_a_clip_model_of_open_clip_loads_the_same(model, preprocess, tmp_path):
    folder = write_folder(tmp_path / "theirs", model, pickled="custom_text" in model, **preprocess)
    compare(folder, *load_model_and_processor(name_or_path=str(folder)))


def test_a_siglip_model_goes_there_and_back(tmp_path):
    preprocess = {"resize_mode": "squash", "mean": [0.5] * 3, "std": [0.5] * 3}
    folder = write_folder(tmp_path / "theirs", SIGLIP, **preprocess)
    siglip_tokenizer().save_pretrained(folder)
    model, processor = load_model_and_processor(name_or_path=str(folder))
    assert isinstance(model, SiglipModel) and find_text_padding(model) == "max_length"
    compare(folder, model, processor)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "run")
    compare(export_run(tmp_path / "run", tmp_path / "exported", "open_clip"), model, processor)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu", "gelu_pytorch_tanh"])
def test_a_model_of_ours_loads_in_open_clip_the_same(activation, tmp_path):
    model, processor = tiny_clip()
    for tower_config in (model.config.vision_config, model.config.text_config):
        tower_config.hidden_act = activation
    square = {"height": 32, "width": 32}
    processor.image_processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=square)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "run")
    model, _ = load_model_and_processor(name_or_path=str(tmp_path / "run"))
    compare(export_run(tmp_path / "run", tmp_path / "exported", "open_clip"), model, processor)


def test_the_vocabulary_of_clip_is_not_written_again(tmp_path):
    """The tokenizer of open_clip's package is then taken there, so that the folder loads from the Hub, too."""
    folder = write_folder(tmp_path / "theirs", CLIP)
    exported = export_run(folder, tmp_path / "exported", "open_clip")
    assert "hf_tokenizer_name" not in (exported / "open_clip_config.json").read_text()
    assert isinstance(open_clip.get_tokenizer(f"local-dir:{exported}"), open_clip.SimpleTokenizer)
    compare(exported, *load_model_and_processor(name_or_path=str(exported)))


def test_where_the_middle_is_not_whole_transformers_cuts_a_pixel_earlier(tmp_path):
    """A known difference, named in docs/bridges.md: 43 - 32 = 11 pixels are cut as 6 + 5 there, and as 5 + 6 here."""
    folder = write_folder(tmp_path / "theirs", CLIP)
    processor = load_model_and_processor(name_or_path=str(folder))[1]
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 87, 3), dtype=np.uint8))
    preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")[2]
    theirs, ours = preprocess(picture), processor.image_processor(images=[picture], return_tensors="pt")
    assert torch.equal(theirs[:, :, :-1], ours["pixel_values"][0][:, :, 1:])
