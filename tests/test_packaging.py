"""A wheel must hold all of the package and nothing else, and what it declares must be what the code imports."""

import ast
import configparser
import json
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
from testing.tiny_recipe import tiny_settings

from hf_dissect.recipe import Recipe
from hf_dissect.runs.job_script import write_job_script
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
    _share_dependencies(folder)
    return folder


def _share_dependencies(folder: Path) -> None:
    """Let an environment read the packages of the one that the tests run in."""
    # A folder named in a .pth file comes after the environment's own, and the .pth files in it are not followed:
    # neither the checkout, if installed as editable, nor another copy of the package can be what is tested.
    packages = dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
    (site_packages,) = folder.glob("lib/python*/site-packages")
    (site_packages / "dependencies.pth").write_text("\n".join(packages), encoding="utf-8")


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
        "skills/hf-dissect/SKILL.md",
        "skills/hf-dissect/references/methods.md",
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


def test_a_job_runs_in_an_environment_that_has_only_the_package(environment, tmp_path):
    script = write_job_script(Recipe.from_dict(tiny_settings(training={"max_steps": 2})))
    (tmp_path / "job.py").write_text(script.text, encoding="utf-8")
    printed = _run([environment / "bin" / "python", "job.py", "training.seed=1"], cwd=tmp_path)
    assert "runs/tiny/report.html" in printed
    metrics = json.loads((tmp_path / "runs" / "tiny" / "metrics.json").read_text())
    assert metrics["steps"] == 2 and metrics["final"]["recall_sum"] > 0 and metrics["seed"] == 1


def test_the_installed_skill_is_whole(environment, tmp_path):
    command = environment / "bin" / "hf-dissect"
    place = Path(_run([command, "skill"], cwd=tmp_path).strip())
    copy = tmp_path / Path(_run([command, "skill", "--install", "skills"], cwd=tmp_path).strip())
    assert place.is_relative_to(environment) and copy == tmp_path / "skills" / "hf-dissect"
    source = ROOT / "hf_dissect" / "skills" / "hf-dissect"
    names = [path.relative_to(source) for path in source.rglob("*") if path.is_file()]
    assert [(copy / name).read_bytes() for name in names] == [(source / name).read_bytes() for name in names]


GITHUB = r"""
import sys
from pathlib import Path

import httpx2
import huggingface_hub
from huggingface_hub.cli.hf import main

TREE = Path(sys.argv[1])


class GitHub(httpx2.BaseTransport):
    # The repository ada/hf-dissect, and no other.
    def handle_request(self, request):
        place = f"{request.url.host}{request.url.path}"
        raw = place.removeprefix("raw.githubusercontent.com/ada/hf-dissect/HEAD/")
        if raw != place and (TREE / raw).is_file():
            return httpx2.Response(200, content=(TREE / raw).read_bytes())
        if place == "github.com/ada/hf-dissect":
            return httpx2.Response(200, text="")
        if place == "github.com/ada/hf-dissect.git/info/refs":
            return httpx2.Response(200, text="015f" + "0" * 39 + "1 HEAD\0")
        return httpx2.Response(404)


huggingface_hub.set_client_factory(lambda: httpx2.Client(transport=GitHub()))
sys.argv = ["hf", *sys.argv[2:]]
main()
"""
# In place of uv, which the client of the Hub prefers to pip: installs the wheel where the archive is asked for.
UV = """#!{python}
import subprocess
import sys

if sys.argv[1] == "venv":
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", sys.argv[2]], check=True)
else:
    assert sys.argv[-1] == "https://github.com/ada/hf-dissect/archive/HEAD.zip", sys.argv
    place = sys.argv[sys.argv.index("--python") + 1]
    pip = [sys.executable, "-m", "pip", "--python", place, "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", "{wheel}"], check=True)
"""


def test_the_client_of_the_hub_installs_and_runs_the_extension(tree, wheel, tmp_path, monkeypatch):
    (tmp_path / "uv").write_text(UV.format(python=sys.executable, wheel=wheel))
    (tmp_path / "uv").chmod(0o755)
    (tmp_path / "github.py").write_text(GITHUB)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path))
    hf = [sys.executable, tmp_path / "github.py", tree]
    printed = _run([*hf, "extensions", "install", "ada/hf-dissect"], cwd=tmp_path)
    assert "Python extension installed" in printed and "hf dissect" in printed
    folder = tmp_path / ".local" / "share" / "hf" / "extensions" / "hf-dissect"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["type"], manifest["short_name"]) == ("python", "dissect")
    assert manifest["description"] == _setup()["metadata"]["description"]
    _share_dependencies(folder / "venv")
    assert _run([*hf, "dissect", "--version"], cwd=tmp_path).strip() == f"hf-dissect {__version__}"
    assert "quickstart" in _run([*hf, "dissect", "recipes"], cwd=tmp_path)
    assert "dissect" in _run([*hf, "--help"], cwd=tmp_path)


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
