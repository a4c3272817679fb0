"""`hf-dissect job`: what is in the script, what is kept out of it, and what is refused."""

import ast
import re
import tomllib
from importlib.metadata import version

import pytest
import yaml
from huggingface_hub.cli._uv_script_header import parse_uv_script_header
from packaging.requirements import Requirement
from testing.tiny_recipe import tiny_settings

from hf_dissect.cli import main
from hf_dissect.recipe import Recipe
from hf_dissect.recipe.yaml import parse_yaml
from hf_dissect.runs.job_script import write_job_script
from hf_dissect.version import __version__

# The pattern of PEP 723.
BLOCK = r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$"
GRID = {"model_type": "frame_sequence_encoder", "grid": [1, 1]}
SEQUENCE = {"model_type": "sequence_encoder"}


def metadata_of(script: str) -> dict:
    """The inline metadata, read as PEP 723 shows; a script has one such block."""
    (block,) = [match for match in re.finditer(BLOCK, script) if match["type"] == "script"]
    lines = block["content"].splitlines(keepends=True)
    return tomllib.loads("".join(line[2:] if line.startswith("# ") else line[1:] for line in lines))


def constants_of(script: str) -> dict:
    """RECIPE, parsed, and FROM_ENVIRONMENT."""
    assigned = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse(script).body
        if isinstance(node, ast.Assign)
    }
    return {"recipe": parse_yaml(assigned["RECIPE"]), "variables": assigned["FROM_ENVIRONMENT"]}


def settings(**sections) -> dict:
    return tiny_settings(**sections)


def write(given: dict, **options):
    return write_job_script(Recipe.from_dict(given), **options)


def test_the_script_holds_the_whole_recipe_and_pinned_packages():
    given = settings()
    script = write(given)
    assert constants_of(script.text) == {"recipe": Recipe.from_dict(given).to_dict(), "variables": {}}
    header = metadata_of(script.text)
    requirements = {requirement.name: requirement for requirement in map(Requirement, header["dependencies"])}
    assert str(requirements.pop("hf_dissect").specifier) == f"=={__version__}"
    assert {"torch", "transformers", "datasets", "peft", "accelerate", "numpy"} <= set(requirements)
    for name, requirement in requirements.items():
        assert str(requirement.specifier) == f"=={version(name).split('+')[0]}"
        assert requirement.specifier.contains(version(name))  # also a build such as 2.13.0+cpu
    assert re.fullmatch(r">=3\.\d+", header["requires-python"])
    assert script.notes == [] and script.from_environment == {}


def test_the_client_of_the_hub_reads_how_to_launch_it():
    hub = {"push_to_hub": True, "hub_model_id": "ada/tiny", "report_to": ["wandb", "tensorboard"]}
    script = write(settings(training=hub), flavor="l4x1", timeout="4h", more_packages=["timm>=1.0"])
    header = parse_uv_script_header(script.text)
    assert (header.name, header.flavor, header.timeout) == ("tiny", "l4x1", "4h")
    assert header.secrets == ["HF_TOKEN", "WANDB_API_KEY"]
    assert header.env == {} and header.image is None
    names = [Requirement(line).name for line in metadata_of(script.text)["dependencies"]]
    assert names[-3:] == ["wandb", "tensorboard", "timm"]
    assert parse_uv_script_header(write(settings()).text).secrets == []


@pytest.mark.parametrize(
    "description",
    [
        '"""; import os',
        r"a \ b \n \u0041 \\",
        'ends with a quote"',
        "größer, 猫, 🐈 and {braces} %s",
        "# /// script",
        "'single' \"double\" # comment: [x]",
        "tab\tand \x85 next line".replace("\x85", ""),
    ],
)
def test_any_text_comes_through(description):
    given = settings(selection={"options": {"variant": "momentum"}}) | {"description": description}
    script = write(given).text
    assert constants_of(script)["recipe"]["description"] == description
    assert metadata_of(script)["dependencies"]


def test_lines_that_look_like_metadata_do_not_end_it():
    config = {**settings()["model"]["config"], "note": "x\n# /// script\n# dependencies = []\n# ///\ny"}
    script = write(settings(model={"config": config})).text
    assert constants_of(script)["recipe"]["model"]["config"]["note"] == config["note"]
    assert len(metadata_of(script)["dependencies"]) > 10


PLACES = [
    ({"data": {"source": "folder", "path": "/data/secret"}}, {"data.path": "HF_DISSECT_DATA_PATH"}),
    ({"data": {"source": "folder", "path": "~/secret"}}, {"data.path": "HF_DISSECT_DATA_PATH"}),
    ({"data": {"source": "folder", "path": "secret"}}, {"data.path": "HF_DISSECT_DATA_PATH"}),
    ({"data": {"source": "folder", "path": "C:\\secret"}}, {"data.path": "HF_DISSECT_DATA_PATH"}),
    (
        {"data": {"source": "webdataset", "path": "https://u:secret@host/x-{000..9}.tar", "streaming": True}},
        {"data.path": "HF_DISSECT_DATA_PATH"},
    ),
    (
        {"data": {"source": "folder", "path": "/secret", "image_root": "/secret/pictures"}},
        {"data.path": "HF_DISSECT_DATA_PATH", "data.image_root": "HF_DISSECT_DATA_IMAGE_ROOT"},
    ),
    ({"model": {"config": None, "name_or_path": "./secret"}}, {"model.name_or_path": "HF_DISSECT_MODEL_NAME_OR_PATH"}),
    ({"model": {"tokenizer": "/secret"}}, {"model.tokenizer": "HF_DISSECT_MODEL_TOKENIZER"}),
    ({"selection": {"ledger": "runs/secret"}}, {"selection.ledger": "HF_DISSECT_SELECTION_LEDGER"}),
    (
        {"objective": {"noisy_channel": {}, "repair": {"encoder": "/secret"}}, "selection": {"strategy": "none"}},
        {"objective.repair.encoder": "HF_DISSECT_OBJECTIVE_REPAIR_ENCODER"},
    ),
    (
        {"evaluation": {"zero_shot": {"source": "folder", "path": "/secret", "classes": ["a"]}}},
        {"evaluation.zero_shot.path": "HF_DISSECT_EVALUATION_ZERO_SHOT_PATH"},
    ),
    ({"training": {"deepspeed": "/secret.json"}}, {"training.deepspeed": "HF_DISSECT_TRAINING_DEEPSPEED"}),
]


@pytest.mark.parametrize(("sections", "variables"), PLACES)
def test_a_place_of_this_machine_becomes_a_variable(sections, variables):
    given = settings(**sections)
    if sections.get("data", {}).get("streaming"):
        given["training"] |= {"max_steps": 2}
    if "path" in sections.get("data", {}):
        given["data"] = sections["data"]
    script = write(given)
    assert script.from_environment == variables
    found = constants_of(script.text)
    assert found["variables"] == variables
    assert "secret" not in script.text
    for key in variables:
        part = found["recipe"]
        for name in key.split("."):
            part = part[name]
        assert part is None


def test_names_of_the_hub_and_files_next_to_the_data_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = {"source": "hub", "path": "ada/pairs", "image_features": "clip.npz"}
    model = {"config": None, "name_or_path": "openai/clip-vit-base-patch32"}
    training = {"output_dir": "runs/mine", "hub_model_id": "ada/mine", "push_to_hub": True}
    given = settings(model=model, training=training) | {"data": data}
    script = write(given)
    assert script.from_environment == {} and script.notes == []
    (tmp_path / "clip.npz").write_bytes(b"")  # now it is a file of this machine
    assert write(given).from_environment == {"data.image_features": "HF_DISSECT_DATA_IMAGE_FEATURES"}


@pytest.mark.parametrize("folder", ["/home/ada/secret", "~/secret", "../secret", "runs/../../secret", "D:\\secret"])
def test_a_run_folder_outside_is_left_out(folder):
    script = write(settings(training={"output_dir": folder}))
    assert "secret" not in script.text and script.from_environment == {}
    assert script.notes == ["training.output_dir was of this machine: the job writes to runs/tiny (or --output-dir)"]


def test_a_path_that_no_setting_can_replace_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = settings() | {"adapter": {"type": "lora", "target_modules": ["q_proj", "/home/ada/x"]}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(given))
    assert main(["job", "mine.yaml"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "adapter.target_modules.1: '/home/ada/x' is of this machine, and no setting can replace it" in printed.err


def test_a_distillation(tmp_path):
    from hf_dissect.distillation import DistillationRecipe

    recipe = DistillationRecipe.from_dict(
        {
            "name": "small",
            "student": {"column": "depth", "config": GRID},
            "auxiliaries": {"skeleton": {"config": SEQUENCE}, "a.b": {"name_or_path": "ada/x", "kind": "text"}},
            "data": {"path": str(tmp_path)},
        }
    )
    script = write_job_script(recipe)
    assert script.from_environment == {"data.path": "HF_DISSECT_DATA_PATH"}
    assert constants_of(script.text)["recipe"]["student"]["config"] == GRID


@pytest.mark.parametrize(
    ("package", "line"),
    [
        ("hf_dissect==0.2", "hf_dissect==0.2"),
        ("hf-dissect>=0.1,<1", "hf-dissect>=0.1,<1"),
        ("hf_dissect @ git+https://host/ada/hf-dissect@main", "hf_dissect @ git+https://host/ada/hf-dissect@main"),
        ("git+ssh://git@host/ada/x.git", "hf_dissect @ git+ssh://git@host/ada/x.git"),
        (
            "https://host/hf_dissect-0.1.0-py3-none-any.whl",
            "hf_dissect @ https://host/hf_dissect-0.1.0-py3-none-any.whl",
        ),
    ],
)
def test_package(package, line):
    assert metadata_of(write(settings(), package=package).text)["dependencies"][0] == line


@pytest.mark.parametrize(
    ("package", "problem"),
    [
        ("/home/ada/hf_dissect.whl", "is a path of this machine"),
        ("./dist/hf_dissect.whl", "is a path of this machine"),
        ("dist/hf_dissect.whl", "is not a requirement"),
        ("hf_dissect @ file:///home/ada/x.whl", "is a path of this machine"),
        ("file:///home/ada/x.whl", "is a path of this machine"),
        ("git+file:///home/ada/x", "has no address after the @"),
        ("hf_dissect @ dist/x.whl", "has no address after the @"),
        ("git+https://ada:hf_token@host/x", "holds a password or token"),
        ("hf_dissect @ https://hf_token@host/x.whl", "holds a password or token"),
        ("numpy==2", "is not hf_dissect"),
        ("", "is not a requirement"),
        ("hf_dissect\n# ///\nimport os", "is not a requirement"),
        ('hf_dissect"]', "is not a requirement"),
    ],
)
def test_package_that_no_other_machine_can_install(package, problem, capsys):
    assert main(["job", "quickstart", "--package", package]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and problem in printed.err and printed.err.count("\n") <= 3


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["job", "quickstrat"], "did you mean quickstart?"),
        (["job", "quickstart", "selection.ratio=2"], "selection.ratio: 2"),
        (["job", "quickstart", "selection.ratio", "0.3"], "write selection.ratio=0.3"),
        (["job", "quickstart", "--flavor", "a b"], "--flavor 'a b' is not allowed"),
        (["job", "quickstart", "--timeout", "1h\n"], "--timeout '1h\\n' is not allowed"),
        (["job", "quickstart", "--with", "./x"], "--with './x' is a path of this machine"),
        (["job", "quickstart", "training.hub_token=hf_x"], "must hold no secret"),
    ],
)
def test_mistakes_print_no_script(words, problem, capsys):
    assert main(words) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and problem in printed.err


def test_the_command_says_what_to_set(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(settings() | {"data": {"source": "folder", "path": "/data/x"}}))
    assert main(["job", "mine.yaml", "training.seed=3"]) == 0
    printed = capsys.readouterr()
    assert constants_of(printed.out)["recipe"]["training"]["seed"] == 3
    assert printed.err.splitlines() == [
        "data.path is of this machine: set HF_DISSECT_DATA_PATH where the job runs, or give it data.path=...",
        f"The script installs hf_dissect=={__version__}, which is not on PyPI yet; --package names another place.",
    ]
