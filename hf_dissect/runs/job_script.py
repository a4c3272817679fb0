"""Writes one Python file that carries out a recipe on another machine: dependencies, recipe and start in one."""

import json
import platform
import re
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from hf_dissect.hub.shared_recipe import find_private_places, is_local_path
from hf_dissect.recipe.fields import RecipeError
from hf_dissect.recipe.file import RecipeFile
from hf_dissect.recipe.yaml import format_yaml
from hf_dissect.version import __version__

OWN_REQUIREMENT = f"hf_dissect=={__version__}"
_DISTRIBUTION = "hf_dissect"
_OUTPUT_DIR = "training.output_dir"
# Packages that settings need and that are not among the requirements of this one.
_TRACKERS = {"comet_ml": "comet-ml"} | {
    name: name for name in ("clearml", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")
}
_SECRETS = {"wandb": "WANDB_API_KEY", "comet_ml": "COMET_API_KEY"}
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")
_REQUIREMENT = re.compile(rf"({_NAME.pattern})\s*(\[[\w\s.,-]*\])?\s*(@\s*\S+.*|[<>=!~;(].*)?")

_SCRIPT = '''\
#!/usr/bin/env -S uv run --script
# /// script
{header}
# ///
"""Train the recipe `{name}`; written by hf-dissect {version}, on Python {python}.

Run it with `uv run FILE`, or with `python FILE` where the packages above are installed. Settings may follow, each as
section.key=value; --help lists the options. Started again, the run continues from the last checkpoint in its folder.
"""

import sys

RECIPE = """\\
{recipe}"""

# Settings that were of one machine, and the environment variables that they are read from.
FROM_ENVIRONMENT = {variables}

if __name__ == "__main__":
    try:
        from hf_dissect.cli.job_run import run_job
    except ModuleNotFoundError as error:
        sys.exit(f"{{error}}; run it as `uv run {{sys.argv[0]}}`, or install the packages that its first lines list")
    sys.exit(run_job(RECIPE, FROM_ENVIRONMENT))
'''


class JobScript(NamedTuple):
    """Script of a job.

    Attributes:
        text: Content of the file.
        from_environment: Environment variable of each setting that was of this machine, by dotted key.
        notes: Further lines for the user, about what is not as in the recipe.
    """

    text: str
    from_environment: dict[str, str]
    notes: list[str]


def write_job_script(
    recipe: RecipeFile,
    *,
    package: str = OWN_REQUIREMENT,
    more_packages: Sequence[str] = (),
    flavor: str | None = None,
    timeout: str | None = None,
) -> JobScript:
    """Write the script that trains a recipe.

    No path of this machine is in it: such a setting is read from an environment variable where the script runs.

    Args:
        recipe: Checked recipe of either kind.
        package: Requirement by which hf_dissect is installed, or the address of its wheel or repository.
        more_packages: Further requirements.
        flavor: Hardware of the job on the Hub; None to leave it to `hf jobs uv run`.
        timeout: Longest duration of the job on the Hub, such as 4h; None to leave it to `hf jobs uv run`.

    Raises:
        RecipeError: A path of this machine stands where no setting can be given in its place.
        ValueError: A requirement is not one that others can install, or flavour or timeout cannot be one.
    """
    notes: list[str] = []
    settings = recipe.to_dict()
    if _drop_output_dir(settings["training"]):
        notes.append(f"{_OUTPUT_DIR} was of this machine: the job writes to runs/{recipe.name} (or --output-dir)")
    variables = _name_variables(recipe, settings)
    for key in variables:
        *sections, name = key.split(".")
        _descend(settings, sections)[name] = None
    trackers = _list_trackers(settings)
    packages = [_check_own_package(package)]
    packages += _pin_requirements(notes)
    packages += [_pin(name) for name in _list_optional_packages(settings, trackers)]
    packages += [_check_requirement(requirement, "--with") for requirement in more_packages]
    launch = {"name": recipe.name, "flavor": flavor, "timeout": timeout}
    for option in ("flavor", "timeout"):
        if launch[option] is not None and not re.fullmatch(r"[\w.-]+", str(launch[option]), re.ASCII):
            raise ValueError(
                f"--{option} {launch[option]!r} is not allowed; allowed: such as l4x1, or 4h for --timeout"
            )
    secrets = ["HF_TOKEN"] if settings["training"].get("push_to_hub") else []
    secrets += [_SECRETS[tracker] for tracker in trackers if tracker in _SECRETS]
    text = _SCRIPT.format(
        header=_format_header(packages, {name: value for name, value in launch.items() if value}, secrets),
        name=recipe.name,
        version=__version__,
        python=platform.python_version(),
        recipe=format_yaml(settings).replace("\\", "\\\\").replace('"""', '\\"\\"\\"'),
        variables=_format_mapping(variables),
    )
    return JobScript(text, variables, notes)


def _drop_output_dir(training: dict[str, Any]) -> bool:
    """Remove a run folder that is not below the working directory; return whether there was one."""
    folder = training.get("output_dir")
    if not folder:
        return False
    path = PurePath(folder)
    if path.is_absolute() or ".." in path.parts or folder.startswith("~") or re.match(r"[A-Za-z]:|\\", folder):
        del training["output_dir"]
        return True
    return False


def _name_variables(recipe: RecipeFile, settings: dict[str, Any]) -> dict[str, str]:
    """Return the environment variable for each setting that is of this machine, by dotted key."""
    variables: dict[str, str] = {}
    faults = []
    for key, value in find_private_places(settings).items():
        if key == _OUTPUT_DIR:
            continue
        *sections, name = key.split(".")
        part = _descend(settings, sections)
        if part.get(name) != value:  # in a list, or below a name with a dot
            faults.append(f"{key}: {value!r} is of this machine, and no setting can replace it; name a Hub id")
            continue
        variable = "HF_DISSECT_" + re.sub(r"\W", "_", key, flags=re.ASCII).upper()
        while variable in variables.values():
            variable += "_2"
        variables[key] = variable
    if faults:
        raise RecipeError(f"recipe {recipe.name}", faults)
    return variables


def _descend(settings: dict[str, Any], sections: Iterable[str]) -> dict[str, Any]:
    """Return the mapping at the end of `sections`; an empty one where there is none."""
    part: Any = settings
    for section in sections:
        part = part.get(section) if isinstance(part, dict) else None
    return part if isinstance(part, dict) else {}


def _list_trackers(settings: dict[str, Any]) -> list[str]:
    given = settings["training"].get("report_to") or []
    return [name for name in ([given] if isinstance(given, str) else given) if name in _TRACKERS]


def _list_optional_packages(settings: dict[str, Any], trackers: Iterable[str]) -> list[str]:
    uses_timm = _descend(settings, ["model", "vision"]).get("timm") is not None
    return ["timm"] * uses_timm + [_TRACKERS[name] for name in trackers]


def _pin_requirements(notes: list[str]) -> list[str]:
    """Return the requirements of this package, each with the version that is installed here."""
    try:
        declared = metadata.requires(_DISTRIBUTION) or []
    except metadata.PackageNotFoundError as error:
        raise ValueError(
            "hf_dissect is not installed here, only imported, so the versions that it needs are not known; install it "
            "with `pip install --editable .` in its folder."
        ) from error
    pinned = []
    for requirement in declared:
        match = re.match(_NAME, requirement)
        if match is None or "extra" in requirement.partition(";")[2]:
            continue
        version = metadata.version(match[0])
        if ".dev" in version:
            notes.append(f"{match[0]} {version} of this machine is no release: the script asks for {requirement}")
            pinned.append(requirement)
        else:
            pinned.append(_pin(match[0]))
    return pinned


def _pin(name: str) -> str:
    """Return the requirement of the installed version of a package; of one that is not installed, any version."""
    try:
        # What follows a plus, such as cpu of torch, is a build that the index of another machine need not have.
        return f"{name}=={metadata.version(name).partition('+')[0]}"
    except metadata.PackageNotFoundError:
        return name


def _check_own_package(package: str) -> str:
    requirement = package.strip()
    if re.match(r"(?:git\+)?\w+://", requirement):
        requirement = f"{_DISTRIBUTION} @ {requirement}"
    requirement = _check_requirement(requirement, "--package")
    match = re.match(_NAME, requirement)
    if match is None or re.sub(r"[-_.]+", "_", match[0]).lower() != _DISTRIBUTION:
        raise ValueError(
            f"--package {package!r} is not hf_dissect; allowed: such as {OWN_REQUIREMENT}, 'hf_dissect @ "
            "git+https://HOST/hf-dissect', or the address of a wheel. Other packages are named by --with."
        )
    return requirement


def _check_requirement(requirement: str, option: str) -> str:
    requirement = requirement.strip()
    _, at, address = (part.strip() for part in requirement.partition("@"))
    problem = None
    if is_local_path(requirement) or is_local_path(address) or Path(requirement).is_file():
        problem = "is a path of this machine, where no other finds it; upload the file and give its address"
    elif re.search(r"://[^/\s]*@", address) and not re.search(r"://git@", address):
        problem = "holds a password or token, which everybody who reads the script would have; leave it out"
    elif not requirement.isprintable() or not re.fullmatch(_REQUIREMENT, requirement):
        problem = "is not a requirement of a package; allowed: NAME, NAME==VERSION, NAME @ ADDRESS"
    elif at and not re.match(r"(?:[a-z]+\+)?(?:https?|ssh)://", address):
        problem = "has no address after the @; allowed: https://..., git+https://..."
    if problem:
        raise ValueError(f"{option} {requirement!r} {problem}.")
    return requirement


def _format_header(packages: Iterable[str], launch: dict[str, str], secrets: Sequence[str]) -> str:
    """Return the TOML of the inline metadata (PEP 723), each line as a comment."""
    lines = [f'requires-python = ">={sys.version_info[0]}.{sys.version_info[1]}"', "dependencies = ["]
    lines += [f"    {_quote(package)}," for package in packages]
    lines += ["]", "", "[tool.hf-jobs]", *(f"{name} = {_quote(value)}" for name, value in launch.items())]
    if secrets:
        lines.append(f"secrets = [{', '.join(map(_quote, secrets))}]")
    return "\n".join(f"# {line}".rstrip() for line in lines)


def _quote(text: str) -> str:
    """Return a basic string of TOML, which printable text in JSON is."""
    return json.dumps(text, ensure_ascii=False)


def _format_mapping(mapping: dict[str, str]) -> str:
    lines = [f"    {json.dumps(key)}: {json.dumps(value)},\n" for key, value in mapping.items()]
    return "{\n" + "".join(lines) + "}" if lines else "{}"
