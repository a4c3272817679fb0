"""Fills the card templates that come with the package, with what comes from data kept from being markup."""

import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

# Installed inside the package; in a source tree at its top level.
_HOMES = Path(__file__).parents[1], Path(__file__).parents[2]


def template_folder() -> Path:
    """Where the templates are, and what they draw from.

    Raises:
        FileNotFoundError: they are neither in the package nor in the source tree.
    """
    folders = [home / "model_cards" for home in _HOMES]
    for folder in folders:
        if any(folder.glob("*.jinja")):
            return folder
    raise FileNotFoundError(f"No card templates in any of {list(map(str, folders))}. Install hf_dissect again.")


def render_card(template: str, **values: object) -> str:
    """The text of a card; templates have the filter `inline`, see `on_one_line`.

    Raises:
        FileNotFoundError: see `template_folder`.
    """
    environment = Environment(
        loader=FileSystemLoader(template_folder()),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["inline"] = on_one_line
    return environment.get_template(template).render(**values)


def on_one_line(text: object) -> str:
    """`text` on one line, without what Markdown or HTML would take for markup, a table cell's end, a tag or a link."""
    return re.sub(r"[&|<>\[\]`\\*]", lambda match: f"&#{ord(match[0])};", " ".join(str(text).split()))
