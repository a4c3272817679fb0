"""Fills the card templates of the package so that text from data cannot act as markup."""

import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

# An installation has them inside the package, a source tree at its top level.
_HOMES = Path(__file__).parents[1], Path(__file__).parents[2]


def find_template_folder() -> Path:
    """Find the folder of the templates and of `citations.bib`.

    Raises:
        FileNotFoundError: it is neither in the package nor in the source tree.
    """
    folders = [home / "model_cards" for home in _HOMES]
    for folder in folders:
        if any(folder.glob("*.jinja")):
            return folder
    raise FileNotFoundError(f"No card templates in any of {list(map(str, folders))}. Install hf_dissect again.")


def render_card(template: str, **values: object) -> str:
    """Fill the card template of this file name; templates may use the filter `inline`, see `put_on_one_line`.

    Raises:
        FileNotFoundError: see `find_template_folder`.
    """
    environment = Environment(
        loader=FileSystemLoader(find_template_folder()),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["inline"] = put_on_one_line
    return environment.get_template(template).render(**values)


def put_on_one_line(text: object) -> str:
    """Put `text` on one line and escape all characters that Markdown or HTML would take for markup."""
    return re.sub(r"[&|<>\[\]`\\*]", lambda match: f"&#{ord(match[0])};", " ".join(str(text).split()))
