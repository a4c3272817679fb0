"""`import hf_dissect` must be all that PEFT needs to know MoLA, in any order, without importing PEFT for it."""

import json
import os
import subprocess
import sys

import pytest
from testing.tiny_bases import adapted, tiny_bert

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
assert sum(type(finder).__name__ == "_PeftFinder" for finder in sys.meta_path) <= 1
"""
SCRIPTS = {
    "before peft": "import hf_dissect\nimport peft\n" + LOADED + KNOWN + FINDERS,
    "before a part of peft": "import hf_dissect\nfrom peft.utils import PeftType\n" + LOADED + KNOWN,
    "after peft": "import peft\nimport hf_dissect\n" + LOADED + KNOWN,
    "after a part of peft": "import peft.tuners.lora\nimport hf_dissect\n" + LOADED + KNOWN,
    "twice and reloaded before": (
        "import importlib, hf_dissect\nimport hf_dissect\nimportlib.reload(hf_dissect)\n"
        "importlib.reload(hf_dissect.models.peft_registration)\nimportlib.reload(hf_dissect)\n"
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
# What PEFT itself imports takes seconds: it is imported once, and each script runs in a fork that has yet to import
# PEFT and this package.
SERVER = """
import json, os, sys, traceback
import peft
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
    return json.loads(python(SERVER, json.dumps(scripts)))


@pytest.mark.parametrize("name", SCRIPTS)
def test_peft_knows_mola(failures, name):
    assert failures[name] == ""


def test_the_package_alone_imports_nothing_heavy():
    python(ALONE)
