"""Names that the package exports: all there, none hidden by a module, and imported on first use only."""

import subprocess
import sys
from pathlib import Path

import hf_dissect

PACKAGE = Path(hf_dissect.__file__).parent
LIGHT = """
import sys
import hf_dissect
assert set(hf_dissect.__all__) <= set(dir(hf_dissect))
heavy = {"torch", "transformers", "peft", "datasets", "numpy", "huggingface_hub", "yaml"} & set(sys.modules)
assert not heavy, heavy
"""


def test_every_exported_name_can_be_imported():
    names = {name: getattr(hf_dissect, name) for name in hf_dissect.__all__}
    functions = {"audit", "evaluate_checkpoint", "make_strategy", "push_run", "run_recipe"}
    assert {name for name in functions if not callable(names[name])} == set()
    assert {name for name, value in names.items() if getattr(value, "__name__", name) != name} == set()
    assert hf_dissect.audit.__module__ == "hf_dissect.runs.audit"


def test_former_names_of_the_distillation_are_the_same_objects():
    from hf_dissect import distillation

    assert distillation.AuxiliaryDistillationTrainer is hf_dissect.DistillationTrainer
    assert distillation.AuxiliaryDistillationArguments is hf_dissect.DistillationTrainingArguments


def test_no_exported_name_is_that_of_a_module():
    # Importing the module would put it in the place of what is exported.
    modules = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert modules & set(hf_dissect.__all__) == set()


def test_the_package_alone_imports_nothing_heavy():
    subprocess.run([sys.executable, "-c", LIGHT], check=True)
