"""Fills the card templates that come with the package, with what comes from data kept from being markup."""

import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

# Installed inside the package; in a source tree at its top level.
_FOLDERS = (Path(__file__).parent / "model_cards", Path(__file__).parent.parent / "model_cards")


def render_card(template: str, **values: object) -> str:
    """The text of a card; templates have the filter `inline`, see `on_one_line`.

    Raises:
        FileNotFoundError: the template is neither in the package nor in the source tree.
    """
    folder = next((folder for folder in _FOLDERS if (folder / template).is_file()), None)
    if folder is None:
        raise FileNotFoundError(f"No {template} in any of {[str(f) for f in _FOLDERS]}. Install hf_dissect again.")
    environment = Environment(
        loader=FileSystemLoader(folder), undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    environment.filters["inline"] = on_one_line
    return environment.get_template(template).render(**values)


def on_one_line(text: object) -> str:
    """`text` on one line, without what Markdown or HTML would take for a table cell's end, a tag or a link."""
    line = " ".join(str(text).split())
    return re.sub(r"[|<>\[\]`\\]", lambda match: f"&#{ord(match[0])};", line)
