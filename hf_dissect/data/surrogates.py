"""Texts with half of a surrogate pair, which JSON can write but UTF-8 and Arrow cannot: marked, so that they count.

`json.loads` returns such texts. A table holds them escaped, behind a mark that no other text has, and the collator
counts their rows as bad ones.
"""

from typing import Any

MARK = "\ufdd0"
"""First character of an escaped text: one of those that Unicode keeps out of all texts."""


def escape_unencodable(value: Any) -> Any:
    """Return a value of JSON in which texts that cannot be encoded are escaped and marked, others unchanged."""
    if isinstance(value, str):
        return value if can_be_encoded(value) else MARK + value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, list | tuple):
        return [escape_unencodable(part) for part in value]
    if isinstance(value, dict):
        return {escape_unencodable(name): escape_unencodable(part) for name, part in value.items()}
    return value


def can_be_encoded(text: str) -> bool:
    """Return whether a text can be encoded as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_unencodable(text: str) -> bool:
    """Return whether a text cannot be encoded, or is the escaped form of one."""
    return text.startswith(MARK) or not can_be_encoded(text)
