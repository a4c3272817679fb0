"""Imports of the package: no circle, no arrow up the order of rooms, nothing of ours in `mola`, nothing crowded."""

import ast
from importlib.util import resolve_name
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
# A room is a folder or a module of the package. It imports itself and the rooms before it.
ROOMS = """
    version settings distributed mola models losses data interop selection evaluation recipe report hub cards
    auditing tracking training watching data_collator objectives objective training_args training_data
    model_card summary trainer distillation runs cli hf_dissect
""".split()
MOST_IN_ROOT, LONGEST_FILE = 12, 350

# Imports that are wrong and not mended yet: importing module, imported module.
EXCEPTIONS: set[tuple[str, str]] = set()
LONG_FILES: set[str] = set()


class Arrow(NamedTuple):
    """One import of ours: `source` imports `target`, modules without `hf_dissect.`, at `place` (file:line)."""

    source: str
    target: str
    place: str

    @property
    def rooms(self) -> tuple[str, str]:
        return self.source.split(".")[0], self.target.split(".")[0]

    def __str__(self) -> str:
        return f"{self.place} imports {self.target}"


def read_modules(root: Path) -> dict[str, Path]:
    """Return the modules of the package, without `hf_dissect.`, and their files."""
    paths = sorted((root / "hf_dissect").rglob("*.py"))
    names = [".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    return dict(zip((name.removeprefix("hf_dissect.") for name in names), paths, strict=True))


def read_arrows(root: Path) -> list[Arrow]:
    """Return all imports of the package by itself, wherever in a file they are."""
    modules, arrows = read_modules(root), []
    for source, path in modules.items():
        parent = ".".join(path.relative_to(root).parts[:-1])
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.ImportFrom):
                base = resolve_name("." * node.level + (node.module or ""), parent)
                names = [f"{base}.{alias.name}" for alias in node.names]
            else:
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in (name for name in names if name.split(".")[0] == "hf_dissect"):
                candidates = (name.removeprefix("hf_dissect."), name.rpartition(".")[0].removeprefix("hf_dissect."))
                target = next((module for module in candidates if module in modules), "hf_dissect")
                arrows.append(Arrow(source, target, f"{path.relative_to(root)}:{node.lineno}"))
    return arrows


def find_circles(arrows: list[Arrow]) -> list[str]:
    """Return the imports that are part of a circle of modules."""
    targets: dict[str, set[str]] = {}
    for arrow in arrows:
        targets.setdefault(arrow.source, set()).add(arrow.target)

    def reached(module: str) -> set[str]:
        seen, waiting = set(), [module]
        while waiting:
            waiting += (new := targets.get(waiting.pop(), set()) - seen)
            seen |= new
        return seen

    reach = {arrow.target: reached(arrow.target) | {arrow.target} for arrow in arrows}
    return [str(arrow) for arrow in arrows if arrow.source in reach[arrow.target]]


def find_arrows_up(arrows: list[Arrow]) -> list[str]:
    """Return the imports of a room by one before it."""
    return [
        f"{arrow}, but {arrow.rooms[0]} comes before {arrow.rooms[1]}"
        for arrow in arrows
        if ROOMS.index(arrow.rooms[0]) < ROOMS.index(arrow.rooms[1])
    ]


def allowed_arrows() -> list[Arrow]:
    return [arrow for arrow in read_arrows(ROOT) if (arrow.source, arrow.target) not in EXCEPTIONS]


def test_every_room_has_its_place():
    rooms = {module.split(".")[0] for module in read_modules(ROOT)}
    assert rooms - set(ROOMS) == set(), "name the new room in ROOMS, after all that it imports"


def test_no_module_imports_itself_by_way_of_others():
    assert find_circles(allowed_arrows()) == []


def test_no_room_imports_one_above_it():
    assert find_arrows_up(allowed_arrows()) == []


def test_mola_can_be_lifted_out():
    assert [str(arrow) for arrow in read_arrows(ROOT) if arrow.rooms[0] == "mola" != arrow.rooms[1]] == []


def test_the_root_is_not_crowded_and_no_file_is_long():
    in_root = [path.name for path in (ROOT / "hf_dissect").glob("*.py")]
    assert len(in_root) <= MOST_IN_ROOT, f"modules in the root: {sorted(in_root)}"
    lines = {
        path.relative_to(ROOT).as_posix(): path.read_text("utf-8").count("\n") for path in read_modules(ROOT).values()
    }
    assert {file: count for file, count in lines.items() if count > LONGEST_FILE and file not in LONG_FILES} == {}


def test_faults_are_found_with_file_and_line(tmp_path):
    files = {
        "__init__.py": "",
        "hub/__init__.py": "",
        "hub/pull.py": "import os\n\ndef pull():\n    from ..cards import rows\n    from hf_dissect.hub import push\n",
        "hub/push.py": "import hf_dissect.hub.pull\nfrom hf_dissect import hub\n",
        "cards/__init__.py": "if TYPE_CHECKING:\n    from hf_dissect import Recipe\n",
        "cards/rows.py": "from hf_dissect.hub.pull import pull\n",
    }
    for name, text in files.items():
        (tmp_path / "hf_dissect" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "hf_dissect" / name).write_text(text)
    arrows = read_arrows(tmp_path)
    assert find_arrows_up(arrows) == [
        "hf_dissect/cards/__init__.py:2 imports hf_dissect, but cards comes before hf_dissect",
        "hf_dissect/hub/pull.py:4 imports cards.rows, but hub comes before cards",
    ]
    assert find_circles(arrows) == [
        "hf_dissect/cards/rows.py:1 imports hub.pull",
        "hf_dissect/hub/pull.py:4 imports cards.rows",
        "hf_dissect/hub/pull.py:5 imports hub.push",
        "hf_dissect/hub/push.py:1 imports hub.pull",
    ]
