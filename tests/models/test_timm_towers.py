"""timm models as vision towers: pictures prepared as timm does, and the way out where timm is missing."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from testing.trained_towers import save_text_tower

from hf_dissect.models.loading import load_model_and_processor
from hf_dissect.models.timm_towers import make_timm_image_processor

HAS_TIMM = importlib.util.find_spec("timm") is not None
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def prepare(pretrained_cfg: dict | None, picture: Image.Image) -> np.ndarray:
    return make_timm_image_processor(pretrained_cfg, "x")(images=[picture], return_tensors="np")["pixel_values"][0]


@pytest.mark.parametrize("mode", ["center", "squash"])
def test_pictures_are_prepared_as_timm_does(mode):
    pixels = np.random.default_rng(0).integers(0, 256, (50, 80, 3), dtype=np.uint8)
    picture, mean, std = Image.fromarray(pixels), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    given = {"input_size": (3, 32, 32), "crop_pct": 0.8, "crop_mode": mode, "interpolation": "bilinear"}
    found = prepare({**given, "mean": mean, "std": std}, picture)
    size = (64, 40) if mode == "center" else (40, 40)  # 32 / 0.8; the shorter side, or both
    resized = np.asarray(picture.resize(size, Image.Resampling.BILINEAR))
    left = (size[0] - 32) // 2
    expected = (resized[4:36, left : left + 32] / 255 - mean) / std
    np.testing.assert_allclose(found, expected.transpose(2, 0, 1), atol=1e-5)


def test_what_timm_leaves_open_has_its_defaults():
    found = prepare(None, Image.new("RGB", (300, 300), (124, 116, 104)))
    assert found.shape == (3, 224, 224) and np.abs(found).max() < 0.02  # the mean of ImageNet
    assert make_timm_image_processor({}, "x").size["shortest_edge"] == 256  # 224 / 0.875


@pytest.mark.parametrize("given", [{"input_size": (1, 28, 28)}, {"input_size": (3, 32, 64)}, {"crop_mode": "border"}])
def test_pictures_that_cannot_be_prepared_so_are_refused(given):
    with pytest.raises(ValueError, match=r"only square RGB pictures.*put a preprocessor_config.json of your own"):
        make_timm_image_processor(given, "model.vision.name_or_path 'x'")


@pytest.mark.skipif(HAS_TIMM, reason="timm is installed")
def test_without_timm_the_way_out_is_named(tmp_path):
    text = save_text_tower(tmp_path / "t")
    folder = tmp_path / "v"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"architecture": "resnet18", "num_classes": 0, "label_names": [], "pretrained_cfg": {}})
    )
    for vision in ({"timm": "resnet18"}, {"name_or_path": str(folder)}):
        with pytest.raises(
            ValueError, match="is a model of timm, which is not installed; install it with: pip install"
        ):
            load_model_and_processor(vision=vision, text={"name_or_path": text})


SCRIPT = """
import sys, torch
sys.path.insert(0, {benchmarks!r})
import torchvision_stand_in
torchvision_stand_in.install()
from transformers import AutoModel, TimmWrapperConfig, TimmWrapperModel
from hf_dissect.models.loading import load_model_and_processor
config = TimmWrapperConfig(architecture="resnet10t", num_labels=0, pretrained_cfg={{"input_size": [3, 32, 32]}})
tower = TimmWrapperModel(config).eval()
tower.save_pretrained("tower")
model, processor = load_model_and_processor(
    vision={{"name_or_path": "tower"}}, text={{"name_or_path": {text!r}}}, projection_dim=8, freeze="vision"
)
pixels = torch.rand(2, 3, 32, 32)
expected = model.visual_projection(tower(pixels).pooler_output)
assert torch.allclose(model.get_image_features(pixels).pooler_output, expected, atol=1e-5)
model.save_pretrained("model")
processor.save_pretrained("model")
loaded, _ = load_model_and_processor(name_or_path="model")
assert torch.allclose(loaded.get_image_features(pixels).pooler_output, expected, atol=1e-5)
try:
    load_model_and_processor(vision={{"timm": "resnet1x"}}, text={{"name_or_path": {text!r}}})
except ValueError as error:
    print(error)
"""


@pytest.mark.skipif(not HAS_TIMM, reason="timm is not installed")
def test_a_timm_model_is_a_tower(tmp_path):
    # In a process of its own, because the stand-in for torchvision stays.
    script = SCRIPT.format(benchmarks=str(BENCHMARKS), text=save_text_tower(tmp_path / "t"))
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "'resnet1x' is not a model of the installed timm" in done.stdout and "did you mean resnet" in done.stdout


def test_a_saved_model_needs_no_file_of_timm(tmp_path):
    """The image processor is saved with the model, as that of CLIP."""
    make_timm_image_processor({"input_size": (3, 48, 48)}, "x").save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["crop_size"] == {"height": 48, "width": 48} and "CLIP" in saved["image_processor_type"]
    assert torch.is_tensor(
        make_timm_image_processor({}, "x")(Image.new("RGB", (9, 9)), return_tensors="pt").pixel_values
    )
