"""The skill for coding agents: its form, that all it names exists, and how it is installed."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from testing.document_pages import ROOT, SKILL, SKILL_PAGES, TEXTS, first_column, links
from testing.tiny_recipe import tiny_recipe

from hf_dissect.cli import main
from hf_dissect.cli.skill import NAME, find_skill, install_skill
from hf_dissect.distillation import DistillationRecipe
from hf_dissect.recipe import Recipe
from hf_dissect.recipe.fields import training_fields
from hf_dissect.recipe.file import shipped_recipes
from hf_dissect.runs.run import run_recipe
from hf_dissect.selection import STRATEGIES
from hf_dissect.settings import list_members, list_settings

MAIN = f"{SKILL}/SKILL.md"
METHODS, RECIPES, REPORTS, FAULTS = SKILL_PAGES[1:]


def codes(page: str) -> list[str]:
    """What stands between backticks on a line of a page."""
    text = re.sub(r"^```.*?^```$", "", TEXTS[page], flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`]+)`", text)


def settings_of(recipe: type) -> set[str]:
    """Every dotted key, sections included."""
    keys = {f"training.{name}" for name in training_fields()}

    def visit(key: str, section: type) -> None:
        keys.add(key)
        for name, (expected, _) in list_settings(section).items():
            keys.add(f"{key}.{name}")
            for member in list_members(expected):
                if hasattr(member, "__dataclass_fields__"):
                    visit(f"{key}.{name}", member)

    for key, section in recipe.sections().items():
        visit(key, section)
    return keys


def test_the_front_matter_is_that_of_the_specification():
    _, front, body = TEXTS[MAIN].split("---\n", 2)
    fields = yaml.safe_load(front)
    assert set(fields) == {"name", "description", "license", "compatibility"}
    assert fields["name"] == NAME == find_skill().name
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", fields["name"]) and len(fields["name"]) <= 64
    assert 0 < len(fields["description"]) <= 1024 and "Use it to" in fields["description"]
    assert 0 < len(fields["compatibility"]) <= 500
    assert len(body.splitlines()) < 500
    assert {f"{SKILL}/{path.relative_to(ROOT / SKILL)}" for path in (ROOT / SKILL).rglob("*.md")} == set(SKILL_PAGES)


@pytest.mark.parametrize("page", SKILL_PAGES)
def test_links_stay_in_the_folder_that_is_copied(page):
    for link in links(page):
        target = (ROOT / page).parent / link
        assert target.is_file() and target.resolve().is_relative_to((ROOT / SKILL).resolve()), link
    if page == MAIN:
        assert {f"{SKILL}/{link}" for link in links(page)} == set(SKILL_PAGES[1:])


@pytest.mark.parametrize("page", SKILL_PAGES)
def test_every_setting_exists(page):
    known = settings_of(Recipe) | settings_of(DistillationRecipe)
    sections = {key.partition(".")[0] for key in known}
    named = [match for code in codes(page) if (match := re.fullmatch(r"([a-z_]+)\.[a-z_.]+(=\S+)?", code))]
    keys = [match[0].partition("=")[0] for match in named if match[1] in sections]
    assert [key for key in keys if key not in known] == []
    for match in named:
        if match[2] and match[1] in sections and not match[1] == "distillation":
            given = {"name": "x", "model": {"name_or_path": "ada/x"}, "selection": {"strategy": "none"}}
            Recipe.from_dict(given | {"objective": {"noisy_channel": {}}}, overrides=_in_context(match[0]))
    if page in (METHODS, RECIPES, FAULTS):
        assert len(keys) > 8


def _in_context(override: str) -> list[str]:
    """The override with what it needs."""
    more = {
        "selection.strategy=noisy_channel": ["objective.noisy_channel=null"],
        "selection.strategy=learnability": ["selection.reference=ada/y"],
        "selection.strategy=coreset": ["selection.reference=ada/y"],
    }
    return [
        override,
        "objective.noisy_channel=null" * ("selection.strategy" in override) or "name=x",
        *more.get(override, []),
    ]


def test_every_recipe_and_strategy_is_named_and_exists():
    assert sorted(first_column(RECIPES, "recipe")) == sorted(shipped_recipes())
    assert sorted(first_column(METHODS, "strategy")) == sorted(STRATEGIES)


def test_every_command_and_option_exists(capsys):
    texts = [*codes(MAIN), *(code for page in SKILL_PAGES[1:] for code in codes(page))]
    options = {option for text in texts for option in re.findall(r"--[a-z-]+", text)} - {"--help"}
    helps = ""
    for command in ("train", "compare", "evaluate", "audit", "recipes", "job", "push", "skill"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        helps += capsys.readouterr().out
    assert options and [option for option in options if option not in helps] == []


def test_every_message_is_one_of_the_package():
    source = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "hf_dissect").rglob("*.py")))
    source = re.sub(r"[\"']\s*\n\s*f?[\"']", "", source)  # literals that Python joins
    messages = first_column(FAULTS, "message has")
    assert len(messages) > 10
    assert [message for message in messages if message not in source] == []


@pytest.fixture(scope="module")
def figures(tmp_path_factory) -> set[str]:
    """The names of all figures in metrics.json of a run."""
    folder = tmp_path_factory.mktemp("run")
    training = {"max_steps": 4, "average_weights": 0.5}
    run_recipe(tiny_recipe(folder, objective={"noisy_channel": {}}, selection={"strategy": "none"}, training=training))
    first = json.loads((folder / "metrics.json").read_text())
    run_recipe(tiny_recipe(folder / "b", training={"max_steps": 6}, selection={"strategy": "small_loss"}))
    second = json.loads((folder / "b" / "metrics.json").read_text())
    parts = [first, second, *(metrics[part] for metrics in (first, second) for part in ("final", "selection"))]
    return {name for part in parts for name in part}


def test_every_figure_is_one_of_a_run(figures):
    named = first_column(REPORTS, "figure in `metrics.json`")
    of_sections = [name for name in named if name not in ("final", "selection", "metrics.json")]
    # Only a run that plans from its ledger loads fewer than the candidates.
    assert [name for name in of_sections if name not in figures | {"loaded_share"}] == [] and len(of_sections) > 8


# ---- installation ----


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_where_it_is(capsys):
    assert main(["skill"]) == 0
    assert Path(capsys.readouterr().out.strip()) == find_skill() and (find_skill() / "SKILL.md").is_file()


def test_it_is_copied_whole(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["skill", "--install", "agents/skills"]) == 0
    copy = tmp_path / capsys.readouterr().out.strip()
    assert copy == tmp_path / "agents" / "skills" / NAME
    assert files_of(copy) == files_of(find_skill())
    assert main(["skill", "--install", "agents/skills"]) == 0  # the same again is nothing to do
    assert [path.name for path in copy.parent.iterdir()] == [NAME]


def test_a_copy_that_differs_is_replaced_by_force_only(tmp_path, capsys):
    copy = install_skill(tmp_path)
    (copy / "SKILL.md").write_text("mine")
    (copy / "references" / "more.md").write_text("mine")
    (copy / "references" / "faults.md").unlink()
    before = files_of(copy)
    assert main(["skill", "--install", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert (
        "differs from this version (SKILL.md, references/faults.md, references/more.md); --force replaces it" in error
    )
    assert files_of(copy) == before
    assert main(["skill", "--install", str(tmp_path), "--force"]) == 0
    assert files_of(copy) == files_of(find_skill())
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_what_is_not_a_skill_is_left_alone(tmp_path):
    (tmp_path / "a" / NAME).mkdir(parents=True)
    (tmp_path / "a" / NAME / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not a skill"):
        install_skill(tmp_path / "a", force=True)
    assert files_of(tmp_path / "a") == {f"{NAME}/thesis.txt": b"mine"}
    (tmp_path / "b").write_text("mine")
    with pytest.raises(ValueError, match="is a file; name the folder of skills"):
        install_skill(tmp_path / "b", force=True)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / NAME).symlink_to(tmp_path / "a")
    with pytest.raises(ValueError, match="is a link or a file"):
        install_skill(tmp_path / "c", force=True)
    with pytest.raises(ValueError, match="is the folder of the skill itself"):
        install_skill(find_skill().parent, force=True)
    (tmp_path / "d" / NAME).mkdir(parents=True)  # an empty folder is no loss
    assert files_of(install_skill(tmp_path / "d")) == files_of(find_skill())


def test_a_copy_that_fails_leaves_nothing_and_what_was_there(tmp_path, monkeypatch):
    """A full disk in the middle of the copy."""

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copy2", fail)
    monkeypatch.setattr(shutil, "copytree", _copy_one_then(fail, shutil.copytree))
    with pytest.raises(OSError, match="No space"):
        install_skill(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "old" / NAME).mkdir(parents=True)
    (tmp_path / "old" / NAME / "SKILL.md").write_text("mine")
    with pytest.raises(OSError, match="No space"):
        install_skill(tmp_path / "old", force=True)
    assert files_of(tmp_path / "old") == {f"{NAME}/SKILL.md": b"mine"}


def _copy_one_then(fail, copytree):
    def copy(source, target, **options):
        Path(target).mkdir()
        (Path(target) / "SKILL.md").write_text("half")
        return fail()

    return copy


def test_force_alone_is_refused(capsys):
    assert main(["skill", "--force"]) == 2
    assert "--install DIR" in capsys.readouterr().err
