"""`hf-dissect skill`: the skill for coding agents that comes with the package."""

import argparse
import filecmp
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from hf_dissect.cli.options import add_command

if TYPE_CHECKING:
    from hf_dissect.cli.options import Commands

NAME = "hf-dissect"
SUMMARY = "Print where the skill for coding agents is, or install it where an agent looks for skills."
EPILOG = """examples:
  hf-dissect skill                                   the folder of the skill
  hf-dissect skill --install .agents/skills          copied to .agents/skills/hf-dissect
  hf-dissect skill --install ~/.claude/skills --force

A skill (agentskills.io) is a folder of instructions that a coding agent reads when a task calls for it."""


def add_parser(commands: "Commands") -> None:
    """Add the command to `hf-dissect`."""
    parser = add_command(commands, "skill", _skill, SUMMARY, EPILOG)
    parser.add_argument("--install", metavar="DIR", help=f"folder of skills, where the folder {NAME} is made")
    parser.add_argument("--force", action="store_true", help="replace a copy there that differs")


def _skill(options: argparse.Namespace) -> None:
    if options.install is not None:
        print(install_skill(options.install, force=options.force))
    elif options.force:
        raise ValueError("--force replaces an installed copy; name its place with --install DIR.")
    else:
        print(find_skill())


def find_skill() -> Path:
    """Return the folder of the skill in the package."""
    return Path(__file__).parents[1] / "skills" / NAME


def install_skill(directory: str | Path, *, force: bool = False) -> Path:
    """Copy the skill, whole or not at all.

    Args:
        directory: Folder of skills; it is made if it does not exist.
        force: True to replace a copy that differs.

    Returns:
        Folder of the copy.

    Raises:
        ValueError: The place is taken by something else, or by a copy that differs and `force` is False.
    """
    source, directory = find_skill(), Path(directory).expanduser()
    target = directory / NAME
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"--install {directory} is a file; name the folder of skills, such as .agents/skills.")
    if directory.resolve().is_relative_to(source.parent.resolve()):
        raise ValueError(f"--install {directory} is the folder of the skill itself; name one of an agent's.")
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ValueError(f"{target} is a link or a file and is left as it is; remove it, or name another folder.")
    if target.exists() and any(target.iterdir()):
        if not (target / "SKILL.md").is_file():
            raise ValueError(f"{target} is not a skill (no SKILL.md) and is left as it is; name another folder.")
        changed = _list_differences(source, target)
        if not changed:
            return target
        if not force:
            raise ValueError(f"{target} differs from this version ({', '.join(changed)}); --force replaces it.")
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=f".{NAME}-") as place:
        shutil.copytree(source, Path(place) / "new", ignore=shutil.ignore_patterns("__pycache__"))
        if target.exists():
            os.rename(target, Path(place) / "old")
        try:
            os.rename(Path(place) / "new", target)
        except OSError:
            if (Path(place) / "old").exists():
                os.rename(Path(place) / "old", target)
            raise
    return target


def _list_differences(source: Path, target: Path) -> list[str]:
    """Return the files that only one of two folders has, or whose contents differ."""
    files = {path.relative_to(folder) for folder in (source, target) for path in folder.rglob("*") if path.is_file()}
    return sorted(
        path.as_posix()
        for path in files
        if not ((source / path).is_file() and (target / path).is_file())
        or not filecmp.cmp(source / path, target / path, shallow=False)
    )
