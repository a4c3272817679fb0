"""The package is written in plain English, in the mood and words of the documentation of PyTorch and transformers."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hf_dissect"
FIRST_WORDS = {"As", "How", "Of", "So", "Such", "Tells", "What", "Where", "Whether", "Which"}
BANNED = re.compile(r"\b(anew|beside|go(es)? on|heed(s|ed)?|(?<!here )is no |told\b)", re.IGNORECASE)

FILES = [path.relative_to(PACKAGE).as_posix() for path in sorted(PACKAGE.rglob("*.py"))]


@pytest.mark.parametrize("name", FILES)
def test_docstrings_comments_and_errors_are_in_plain_words(name):
    source = (PACKAGE / name).read_text(encoding="utf-8")
    found = [f"{name}:{line}: {text!r}" for line, text in find_offences(source)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source, count",
    [
        ('"""Return the mean."""\n', 0),
        ('"""What the mean is."""\n', 1),
        ('class Mean:\n    """How much."""\n', 1),
        ('def mean():\n    """Return it; the caller is told."""\n', 1),
        ("x = 1  # made anew\n", 1),
        ('raise ValueError(f"{x} is no number.")\n', 1),
        ('"""Return None where there is no number."""\n', 0),
        ('x = "told"\n', 0),
    ],
)
def test_the_check_finds_what_it_is_for(source, count):
    assert len(list(find_offences(source))) == count


def find_offences(source: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of each docstring, comment or error message that breaks the rules."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node) or ""
            words = docstring.split()
            if (words and words[0].strip(":,.") in FIRST_WORDS) or BANNED.search(docstring):
                yield getattr(node, "lineno", 1), docstring.partition("\n")[0]
        elif isinstance(node, ast.Raise):
            parts = (part.value for part in ast.walk(node) if isinstance(part, ast.Constant))
            message = " ".join(part for part in parts if isinstance(part, str))
            if BANNED.search(message):
                yield node.lineno, message
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and BANNED.search(token.string):
            yield token.start[0], token.string
