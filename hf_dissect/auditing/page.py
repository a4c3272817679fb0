"""HTML page of the audited pairs that opens from the file system, for any number of pairs."""

import base64
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from hf_dissect.data.bad_rows import BadRows
from hf_dissect.report.data import replace_file
from hf_dissect.version import __version__

MAX_CAPTION = 400
MAX_BAD_IDS = 200

_EARLIER = "earlier_correlation"
_MEASURES = {
    # column: (name on the page, digits, True for the highest first)
    "score": ("score", 2, False),
    "p_mismatched": ("p(mismatched)", 3, True),
    "local_fdr": ("local fdr", 3, True),
    "correlation": ("correlation", 2, False),
    _EARLIER: ("correlation before training", 2, False),
    "fold": ("fold", 0, False),
    "row": ("row in the data", 0, False),
}
_LEDGER_MEASURES = {
    "ledger_differential": ("differential", 2, False),
    "ledger_label": ("soft label", 3, False),
    "ledger_match": ("match, by the run", 3, False),
}


def write_page(
    path: str | os.PathLike,
    table: pa.Table,
    *,
    title: str,
    facts: Sequence[tuple[str, str]],
    notes: Sequence[str] = (),
    bad_rows: BadRows,
    pictures: str | None = None,
    unpictured: Sequence[int] = (),
) -> Path:
    """Write the page under a temporary name first, so that an earlier one stays until the new one is complete.

    Args:
        path: HTML file.
        table: Table of readable pairs, see `build_score_table`; the page shows all of them.
        title: Heading of the page.
        facts: Names and values to show at the top.
        notes: Sentences below the facts.
        bad_rows: Rows that could not be read.
        pictures: Folder of `write_thumbnails`, next to the page; None without pictures.
        unpictured: Rows without a picture there.

    Returns:
        `path`.
    """
    folder = Path(__file__).parent
    script = (folder / "audit.js").read_text("utf-8")
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    content = {
        "id": [str(sample_id) for sample_id in table["sample_id"].to_pylist()],  # JavaScript has no 64-bit integers
        "row": table["row"].to_pylist(),
        "source": _list_sources(table),
        "caption": [_shortened(caption) for caption in table["caption"].to_pylist()],
        "clean": table["is_clean"].to_pylist() if "is_clean" in table.column_names else None,
        "measures": _measures(table),
        "folder": pictures,
        "unpictured": None if pictures is None else list(unpictured),
    }
    pairs = _as_data_block(content)
    page = environment.get_template("audit.html.jinja").render(
        title=title,
        version=__version__,
        facts=facts,
        notes=notes,
        bad=bad_rows.summary(max_ids=MAX_BAD_IDS),
        style=Markup((folder / "audit.css").read_text("utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        pairs=pairs,
        audit=hashlib.sha256(pairs.encode("utf-8", "replace")).hexdigest()[:16],
    )
    return replace_file(path, page)


def _measures(table: pa.Table) -> list[dict[str, Any]]:
    known = _MEASURES | _LEDGER_MEASURES
    others = [name for name in table.column_names if name.startswith("ledger_") and name not in known]
    described = {name: known[name] for name in known if name in table.column_names}
    described |= {name: (name.replace("_", " "), 3, False) for name in others}
    # Pairs that the model trained on have none of some columns, and are ranked by their scores from before.
    described = {name: entry for name, entry in described.items() if table[name].null_count < len(table)}
    if _EARLIER in described:
        described = {_EARLIER: described[_EARLIER]} | described
    return [
        {
            "key": name,
            "name": label,
            "digits": digits,
            "descending": descending,
            "values": _rounded(table, name, digits),
        }
        for name, (label, digits, descending) in described.items()
    ]


def _list_sources(table: pa.Table) -> list[str] | None:
    """Return what identifies each pair in the user's data, without the path, which a published page must not show."""
    name = next((name for name in ("id", "key", "file_name") if name in table.column_names), None)
    if name is None:
        return None
    values = ["" if value is None else str(value) for value in table[name].to_pylist()]
    return [
        _shortened(value.replace("\\", "/").rsplit("/", 1)[-1] if name == "file_name" else value) for value in values
    ]


def _rounded(table: pa.Table, name: str, digits: int) -> list[float | None]:
    values = table[name].to_numpy(zero_copy_only=False).astype(np.float64)
    if not digits:
        return values.astype(np.int64).tolist()
    return [value if np.isfinite(value) else None for value in values.round(digits).tolist()]


def _shortened(caption: str) -> str:
    return caption if len(caption) <= MAX_CAPTION else caption[:MAX_CAPTION] + "…"


def _as_data_block(content: dict[str, Any]) -> Markup:
    """Return JSON that can neither end the script element around it nor open a comment there."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c"))
