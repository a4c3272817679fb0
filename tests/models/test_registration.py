"""`import hf_dissect` is all that PEFT needs to know MoLA, and transformers to know our models, in any order.

It imports neither of them.
"""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from testing import tiny_models
from testing.tiny_bases import adapted, tiny_bert
from testing.trained_towers import save_text_tower, save_vision_tower
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import hf_dissect
from hf_dissect import TwinDualEncoder, load_model_and_processor
from hf_dissect.distillation import FrameSequenceEncoderConfig, StudentConfig, StudentForClassification
from hf_dissect.models.registration import MODEL_CONFIGS

KNOWN = """
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
import hf_dissect.mola
assert PEFT_TYPE_TO_CONFIG_MAPPING["MOLA"] is hf_dissect.mola.MolaConfig
assert PEFT_TYPE_TO_TUNER_MAPPING["MOLA"] is hf_dissect.mola.MolaModel
assert PEFT_TYPE_TO_PREFIX_MAPPING["MOLA"] == "mola_"
assert [str(key.value) for key in PEFT_TYPE_TO_CONFIG_MAPPING].count("MOLA") == 1
"""
LOADED = """
from peft import PeftConfig
config = PeftConfig.from_pretrained(FOLDER)
assert type(config).__name__ == "MolaConfig" and config.num_experts == 3, config
"""
FINDERS = """
import sys
assert sum(type(finder).__name__ == "_ActingFinder" for finder in sys.meta_path) <= 1
"""
SCRIPTS = {
    "before peft": "import hf_dissect\nimport peft\n" + LOADED + KNOWN + FINDERS,
    "before a part of peft": "import hf_dissect\nfrom peft.utils import PeftType\n" + LOADED + KNOWN,
    "after peft": "import peft\nimport hf_dissect\n" + LOADED + KNOWN,
    "after a part of peft": "import peft.tuners.lora\nimport hf_dissect\n" + LOADED + KNOWN,
    "twice and reloaded before": (
        "import importlib, hf_dissect\nimport hf_dissect\nimportlib.reload(hf_dissect)\n"
        "importlib.reload(hf_dissect.models.after_import)\nimportlib.reload(hf_dissect.models.registration)\nimportlib.reload(hf_dissect)\n"
        + LOADED
        + KNOWN
        + FINDERS
    ),
    "reloaded after": "import importlib, peft, hf_dissect\nimportlib.reload(hf_dissect)\n" + LOADED + KNOWN + FINDERS,
    "peft reloaded": "import importlib, hf_dissect, peft\nimportlib.reload(peft)\n" + LOADED + KNOWN,
    "mola first": "import hf_dissect.mola\n" + LOADED + KNOWN,
    "the configuration class first": "from hf_dissect import MolaConfig\nMolaConfig()\n" + LOADED + KNOWN,
    "peft looked for in between": """
import importlib.util, sys
import hf_dissect
spec = importlib.util.find_spec("peft")
assert spec.name == "peft" and spec.origin.endswith("__init__.py") and spec.submodule_search_locations
assert importlib.util.find_spec("peft") is not None and "peft" not in sys.modules
assert spec.loader.is_package("peft") and "PeftModel" in spec.loader.get_source("peft")
import peft
assert importlib.util.find_spec("peft") is peft.__spec__
assert importlib.util.find_spec("peft.tuners") is not None
import importlib.resources, inspect
assert (importlib.resources.files("peft") / "py.typed").is_file()
assert "PeftModel" in inspect.getsource(peft)
"""
    + LOADED
    + KNOWN,
    "peft forbidden": """
import sys
sys.modules["peft"] = None
import hf_dissect
try:
    import peft
except ModuleNotFoundError:
    del sys.modules["peft"]
else:
    raise AssertionError
import peft
"""
    + LOADED
    + KNOWN,
    "peft absent": """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name == "peft":
            raise ModuleNotFoundError("No module named 'peft'", name="peft")
sys.meta_path.insert(0, Absent())
import hf_dissect
try:
    import peft
except ModuleNotFoundError as error:
    assert error.name == "peft"
else:
    raise AssertionError
""",
}
ALONE = """
import sys
import hf_dissect
assert "MolaConfig" in dir(hf_dissect)
heavy = {"torch", "peft", "transformers", "numpy", "datasets"} & set(sys.modules)
assert not heavy, heavy
"""
MODEL = """
from transformers import AutoConfig, AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
config = AutoConfig.from_pretrained(FOLDER)
assert type(config).__name__ == "DualEncoderConfig" and config.text_config.hidden_size == 32, config
assert CONFIG_MAPPING["dual_encoder"] is type(config)
model = AutoModel.from_pretrained(FOLDER)
assert type(model).__name__ == "DualEncoder" and type(AutoModel.from_config(config)) is type(model)
"""
PIPELINE = """
from PIL import Image
from transformers import pipeline
import logging, transformers
heard = []
handler = logging.Handler()
handler.emit = lambda record: heard.append(record.getMessage())
logging.getLogger("transformers").addHandler(handler)
classify = pipeline("zero-shot-image-classification", model=FOLDER)
answers = classify(Image.new("RGB", (40, 30), "red"), candidate_labels=["red", "green", "left"])
assert type(classify.model).__name__ == MODEL_NAME, type(classify.model)
assert not [line for line in heard if "not supported" in line], heard
from transformers import AutoProcessor
import torch
processor = AutoProcessor.from_pretrained(FOLDER)
texts = [f"This is a photo of {name}." for name in ("red", "green", "left")]
inputs = processor(text=texts, images=[Image.new("RGB", (40, 30), "red")], padding=True, return_tensors="pt")
with torch.no_grad():
    expected = classify.model(**inputs).logits_per_image.softmax(-1)[0].tolist()
found = {answer["label"]: answer["score"] for answer in answers}
assert all(abs(found[name] - value) < 1e-5 for name, value in zip(("red", "green", "left"), expected))
"""
HEAVY = """
import sys
loaded = [name for name in sys.modules if name.startswith("hf_dissect.models.") and name.endswith("_encoder")]
assert not loaded, loaded
"""
STUDENT = """
from transformers import AutoModelForImageClassification
import pickle, sys
student = AutoModelForImageClassification.from_pretrained(STUDENT)
assert type(student).__name__ == "StudentForClassification" and "hf_dissect.trainer" not in sys.modules
assert type(pickle.loads(pickle.dumps(student.config))) is type(student.config)
"""
TRANSFORMERS_SCRIPTS = {
    "before a model that ours are made of": (
        "import hf_dissect\nfrom transformers import CLIPModel\n"
        + HEAVY
        + MODEL
        + "MODEL_NAME = 'DualEncoder'\n"
        + PIPELINE
        + "FOLDER, MODEL_NAME = TWINS, 'TwinDualEncoder'\n"
        + PIPELINE
        + STUDENT
        + FINDERS
    ),
    "after AutoModel, and reloaded": (
        "from transformers import AutoModel, AutoConfig\nimport hf_dissect, importlib\n"
        + HEAVY
        + "importlib.reload(hf_dissect.models.registration)\nimportlib.reload(hf_dissect)\n"
        + MODEL
        + "importlib.reload(hf_dissect.models.registration)\nimportlib.reload(hf_dissect)\n"
        + MODEL
        + FINDERS
    ),
    "the model type alone": """
import transformers
import hf_dissect
from transformers import AutoConfig, AutoModel
towers = {
    "vision_config": {"model_type": "precomputed_features", "hidden_size": 5},
    "text_config": {"model_type": "precomputed_features", "hidden_size": 4},
}
config = AutoConfig.for_model("dual_encoder", **towers, vision_size=5, text_size=4, text_pooling="pooler")
assert type(AutoModel.from_config(config)).__name__ == "DualEncoder"
twins = AutoModel.from_config(AutoConfig.for_model("twin_dual_encoder", first_config=config, second_config=config))
assert type(twins.first).__name__ == "DualEncoder"
""",
    "what it imports is absent": """
import hf_dissect, sys
from transformers import AutoConfig
sys.modules["hf_dissect.models.dual_encoder"] = None
try:
    AutoConfig.from_pretrained(FOLDER)
except ImportError as error:
    assert "hf_dissect.models.dual_encoder" in str(error), error
else:
    raise AssertionError
""",
}
# What PEFT itself imports takes seconds: it is imported once, and each script runs in a fork that has yet to import
# PEFT and this package.
SERVER = """
import json, os, sys, traceback
import IMPORTED
for name in [name for name in sys.modules if name.split(".")[0] in ("peft", "hf_dissect")]:
    del sys.modules[name]
failed = {}
for name, script in json.load(sys.stdin).items():
    read, write = os.pipe()
    if os.fork() == 0:
        try:
            exec(script, {"__name__": "__main__"})
        except BaseException:
            os.write(write, traceback.format_exc().encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as end:
        failed[name] = end.read()
    os.wait()
print(json.dumps(failed))
"""


def python(script: str, text: str = "") -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script]
    finished = subprocess.run(command, input=text, capture_output=True, text=True, env=environment)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    """The traceback of every script, empty where there was none."""
    folder = tmp_path_factory.mktemp("adapter")
    adapted(tiny_bert(), variant="grad").save_pretrained(folder)
    scripts = {name: f"FOLDER = {str(folder)!r}\n{script}" for name, script in SCRIPTS.items()}
    return json.loads(python(SERVER.replace("IMPORTED", "peft"), json.dumps(scripts)))


@pytest.fixture(scope="module")
def transformers_failures(tmp_path_factory):
    """The traceback of every script about transformers, empty where there was none."""
    folder = tmp_path_factory.mktemp("towers")
    towers = {
        "vision": {"name_or_path": save_vision_tower(folder / "v")},
        "text": {"name_or_path": save_text_tower(folder / "t")},
    }
    model, processor = load_model_and_processor(**towers, projection_dim=8)
    clip, clip_processor = tiny_models.tiny_clip()
    for name, (whole, its_processor) in {
        "dual": (model, processor),
        "twins": (TwinDualEncoder.of(clip, tiny_models.tiny_clip(seed=1)[0]), clip_processor),
    }.items():
        whole.save_pretrained(folder / name)
        its_processor.save_pretrained(folder / name)
    encoder = FrameSequenceEncoderConfig(channels=[4, 4, 4], hidden_size=8)
    StudentForClassification(StudentConfig(encoder_config=encoder, id2label={0: "a", 1: "b"})).save_pretrained(
        folder / "student"
    )
    places = {"FOLDER": "dual", "TWINS": "twins", "STUDENT": "student"}
    given = "".join(f"{name} = {str(folder / place)!r}\n" for name, place in places.items())
    scripts = {name: given + script for name, script in TRANSFORMERS_SCRIPTS.items()}
    imported = "torch, numpy, PIL.Image, safetensors, tokenizers, huggingface_hub, datasets"
    return json.loads(python(SERVER.replace("IMPORTED", imported), json.dumps(scripts)))


@pytest.mark.parametrize("name", SCRIPTS)
def test_peft_knows_mola(failures, name):
    assert failures[name] == ""


def test_the_package_alone_imports_nothing_heavy():
    python(ALONE)


@pytest.mark.parametrize("name", TRANSFORMERS_SCRIPTS)
def test_transformers_knows_our_models(transformers_failures, name):
    assert transformers_failures[name] == ""


def test_all_model_types_are_registered():
    classes = {"DualEncoderConfig", "FrameSequenceEncoderConfig", "PrecomputedFeaturesConfig", "SequenceEncoderConfig"}
    classes |= {"StudentConfig", "TwinDualEncoderConfig"}
    sources = [path.read_text("utf-8") for path in Path(hf_dissect.__file__).parent.rglob("*.py")]
    assert {name for text in sources for name in re.findall(r"^class (\w+)\(PreTrainedConfig", text, re.M)} == classes
    for model_type, (module, name) in MODEL_CONFIGS.items():
        found = getattr(importlib.import_module(module), name)
        assert found.model_type == model_type and CONFIG_MAPPING[model_type] is found
        classes.remove(name)
    assert not classes
