"""Reads README.md and the pages of docs/: their commands, snippets, tables and links."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Commands run in this order, and each of them once: a page may use the runs of the pages before it.
PAGES = (
    "README.md",
    *("docs/index.md", "docs/quickstart.md", "docs/tutorial.md", "docs/python.md", "docs/recipes.md", "docs/data.md"),
    *(
        "docs/which_method.md",
        "docs/strategies.md",
        "docs/noisy_channel.md",
        "docs/repair.md",
        "docs/ledger_first.md",
        "docs/costs.md",
        "docs/speed.md",
    ),
    *("docs/soft_labels.md", "docs/mola.md", "docs/peft_proposal.md", "docs/distillation.md"),
    *(
        "docs/run_folder.md",
        "docs/watch.md",
        "docs/hub.md",
        "docs/bridges.md",
        "docs/jobs.md",
        "docs/audit.md",
        "docs/many_gpus.md",
        "docs/own_strategy.md",
    ),
    *("docs/results.md", "docs/paper_index.md", "docs/limits.md"),
)
SKILL = "hf_dissect/skills/hf-dissect"
# The skill for coding agents, whose commands run after those of the pages.
SKILL_PAGES = (
    f"{SKILL}/SKILL.md",
    *(f"{SKILL}/references/{name}.md" for name in ("methods", "recipes", "reports", "faults")),
)
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in (*PAGES, *SKILL_PAGES)}


def blocks(page: str, language: str) -> list[str]:
    """Return the fenced blocks of a page that are in `language`."""
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXTS[page], flags=re.MULTILINE | re.DOTALL)


def languages() -> set[str]:
    """Return the languages of all fenced blocks; a block without one counts as the empty word."""
    fences = [fence for text in TEXTS.values() for fence in re.findall(r"^```(.*)$", text, flags=re.MULTILINE)]
    return set(fences[::2])


def commands() -> list[str]:
    """Return the distinct commands of all pages in the order of their first appearance."""
    lines = [line for page in TEXTS for block in blocks(page, "console") for line in block.splitlines()]
    return list(dict.fromkeys(line.removeprefix("$ ") for line in lines))


def inline_code() -> list[str]:
    """Return what stands between backticks within the text of all pages."""
    texts = [re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL) for text in TEXTS.values()]
    return [code.replace("\n", " ") for text in texts for code in re.findall(r"`([^`]+)`", text)]


def table(page: str, heading: str) -> list[list[str]]:
    """Return the cells of the table whose first column is headed `heading`, row by row."""
    text = TEXTS[page]
    rows = text[text.index(f"\n| {heading} |") + 1 :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]


def first_column(page: str, heading: str) -> list[str]:
    """Return the names in code in the first column of a table."""
    return [name for row in table(page, heading) for name in re.findall(r"`([^`]+)`", row[0])]


def links(page: str) -> list[str]:
    """Return the targets of the links and pictures of a page."""
    return re.findall(r"\]\(([^)\s]+)\)", TEXTS[page])


def anchors(page: str) -> set[str]:
    """Return the names by which the headings of a page are linked to."""
    text = re.sub(r"^```.*?^```$", "", TEXTS[page], flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}
