"""A wheel must hold all of the package and nothing else, and what it declares must be what the code imports."""

import ast
import configparser
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from hf_dissect.version import __version__

ROOT = Path(__file__).parents[1]
# What a build reads, and four folders that it must leave out.
BUILD_INPUTS = ("hf_dissect", "recipes", "model_cards", "setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md")
BUILD_INPUTS += ("LICENSE", "tests", "benchmarks", "docs")
TOP_LEVEL_DATA = ("recipes", "recipes/accelerate", "model_cards")

USE_WHAT_IS_SHIPPED = """
import hf_dissect
from hf_dissect.distillation import DistillationRecipe
from hf_dissect.evaluation import load
from hf_dissect.model_card import write_model_card
from hf_dissect.recipe.recipe import Recipe
from hf_dissect.recipe.file import shipped_recipes
from hf_dissect.report.selection import RunSummary, write_report

print(hf_dissect.__file__)
for name, path in shipped_recipes().items():
    print(path)
    assert (DistillationRecipe if name.startswith("amid") else Recipe).load(name).name == name
metrics = {"name": "packaged run", "final": {"recall_sum": 123.4}}
assert "packaged run" in write_model_card("card.md", metrics=metrics).read_text(encoding="utf-8")
report = write_report("report.html", [RunSummary("packaged run", metrics)], title="Packaged")
assert "packaged run" in report.read_text(encoding="utf-8")
assert load("retrieval").name == "retrieval"
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of what a wheel is built from: a build leaves folders behind in its tree."""
    copy = tmp_path_factory.mktemp("tree")
    for name in BUILD_INPUTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif (ROOT / name).is_file():
            shutil.copy(ROOT / name, copy)
    (copy / "site").mkdir()  # what `make docs` leaves
    (copy / "site" / "index.html").write_text("<html></html>")
    return copy


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory) -> Path:
    """The built wheel."""
    folder = tmp_path_factory.mktemp("dist")
    _run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, tree], cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """A new environment with nothing but the wheel; the dependencies are read from the one the tests run in."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    _run([*pip, "install", "--quiet", "--no-deps", "--no-index", wheel], cwd=folder)
    # A folder named in a .pth file comes after the environment's own, and the .pth files in it are not followed:
    # neither the checkout, if installed as editable, nor another copy of the package can be what is tested.
    packages = dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
    (site_packages,) = folder.glob("lib/python*/site-packages")
    (site_packages / "dependencies.pth").write_text("\n".join(packages), encoding="utf-8")
    return folder


def test_the_wheel_holds_the_whole_package_and_nothing_else(tree, wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    metadata = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    package = {path.relative_to(tree).as_posix() for path in (tree / "hf_dissect").rglob("*") if path.is_file()}
    files = [path for part in TOP_LEVEL_DATA for path in (tree / part).iterdir() if path.is_file()]
    data = {f"hf_dissect/{path.relative_to(tree).as_posix()}" for path in files}
    assert names - metadata == package | data
    # By name as well, in case a folder of the tree is empty by mistake.
    for needed in (
        "recipes/quickstart.yaml",
        "recipes/accelerate/multi-gpu.yaml",
        "model_cards/dissect.md.jinja",
        "model_cards/student.md.jinja",
        "report/templates/distillation.html.jinja",
        "auditing/audit.html.jinja",
        "trainer.py",
        "py.typed",
    ):
        assert f"hf_dissect/{needed}" in names
    assert any(name.endswith("/LICENSE") for name in metadata)


def test_the_installed_command_answers_without_the_checkout(environment, tmp_path):
    command = environment / "bin" / "hf-dissect"
    lines = _run([command, "recipes"], cwd=tmp_path).splitlines()
    assert [line.split()[0] for line in lines] == sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
    assert all(len(line.split()) > 3 for line in lines), "a recipe without a description"
    fsdp2 = ROOT / "recipes" / "accelerate" / "fsdp2.yaml"
    assert _run([command, "recipes", "--accelerate", "fsdp2"], cwd=tmp_path) == fsdp2.read_text(encoding="utf-8")
    assert _run([command, "--version"], cwd=tmp_path).strip() == f"hf-dissect {__version__}"
    assert {"train", "evaluate", "compare", "recipes"} <= set(_run([command, "--help"], cwd=tmp_path).split())


def test_what_is_shipped_is_read_from_the_installed_package(environment, tmp_path):
    paths = _run([environment / "bin" / "python", "-c", USE_WHAT_IS_SHIPPED], cwd=tmp_path).splitlines()
    assert len(paths) == 1 + len(list((ROOT / "recipes").glob("*.yaml")))
    assert all(Path(path).is_relative_to(environment) for path in paths)


def test_every_folder_with_code_is_declared_as_a_package():
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "hf_dissect").rglob("*.py")}
    expected = {".".join(folder.parts) for folder in folders} | {
        f"hf_dissect.{part.replace('/', '.')}" for part in TOP_LEVEL_DATA
    }
    assert set(_setup()["options"]["packages"].split()) == expected


def test_the_dependencies_are_what_the_code_imports():
    distributions = packages_distributions()
    modules = _third_party_imports(ROOT / "hf_dissect")
    imported = {canonicalize_name(distributions.get(module, [module])[0]) for module in modules}
    assert imported - {"sentence-transformers"} == set(_requirements("install_requires"))
    # The class that sentence-transformers itself imports; no other module does.
    optional = [path for path in (ROOT / "hf_dissect").rglob("*.py") if "import sentence_transformers" in _text(path)]
    optional += [path for path in (ROOT / "hf_dissect").rglob("*.py") if "from sentence_transformers" in _text(path)]
    assert [path.name for path in optional] == ["sentence_encoder.py"]


@pytest.mark.parametrize("group", ["install_requires", "dev", "docs", "quantization", "bridges"])
def test_every_dependency_has_a_lower_bound_and_a_pin_within_it(group):
    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            pins[canonicalize_name(name)] = version
    for name, requirement in _requirements(group).items():
        assert [bound.operator for bound in requirement.specifier] == [">="], requirement
        assert name in pins, f"{name} is not pinned in constraints.txt"
        assert requirement.specifier.contains(pins[name]), f"{name}=={pins[name]} is pinned, but {requirement} needed"


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _setup() -> configparser.ConfigParser:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    return setup


def _requirements(group: str) -> dict[str, Requirement]:
    """Name -> requirement of `install_requires` or of an extra."""
    section = "options" if group == "install_requires" else "options.extras_require"
    requirements = [Requirement(line) for line in _setup()[section][group].strip().splitlines()]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def _third_party_imports(folder: Path) -> set[str]:
    """Top-level names of the modules that the code in `folder` imports and that are neither its own nor Python's."""
    names: set[str] = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - {folder.name}


def _run(command: list, cwd: Path) -> str:
    """The output of a command that must succeed, run where the checkout is not on Python's path."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["HF_HOME"] = str(cwd / "huggingface")  # Modules are copied there; the user's own stays as it is.
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout
