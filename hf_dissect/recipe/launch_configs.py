"""The ready configurations of `accelerate launch` that come with the package."""

from pathlib import Path

from hf_dissect.recipe.file import shipped_recipes


def shipped_launch_configs() -> dict[str, Path]:
    """Return the file of each configuration, by a name such as `multi-gpu` in alphabetical order."""
    folder = next(iter(shipped_recipes().values())).parent / "accelerate"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def read_summary(path: Path) -> str:
    """Return the purpose of a configuration: the comment in its first line."""
    with path.open(encoding="utf-8") as file:
        return file.readline().removeprefix("#").strip()
