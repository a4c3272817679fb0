"""Problems of rows as columns of bytes, which travel in a batch from the workers and between ranks as tensors do."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

PROBLEM_KEY = "bad_problem"
"""Key of the column in a batch, uint8 `(B, 240)`: UTF-8 text, zeros at its end; zeros alone for a good row."""
_WIDTH = 240
_BETWEEN = "\n"
"""Character between what is wrong and the path or key of the row."""


def join_problem(problem: str, path: str | None = None) -> str:
    """Return a problem and the path or key of its row as one text, short enough for a batch."""
    problem, path = " ".join(problem.split()), " ".join((path or "").split())
    room = _WIDTH - len(_BETWEEN)
    longest_path = max(room // 2, room - len(_encode(problem)))
    path = _shorten(path, longest_path)
    return _BETWEEN.join([_shorten(problem, room - len(_encode(path))), path]) if path else _shorten(problem, _WIDTH)


def split_problem(text: str) -> tuple[str, str | None]:
    """Return the problem, and the path or key if there is one."""
    problem, _, path = text.partition(_BETWEEN)
    return problem, path or None


def describe_problem(text: str) -> str:
    """Return a joined problem as people read it, "no such file: /data/7.jpg"."""
    return text.replace(_BETWEEN, ": ")


def list_problems(problems: Mapping[int, str], most: int = 20) -> list[dict[str, Any]]:
    """Return the problems of the lowest sample ids as plain data, with `id`, `problem` and `path`."""
    split = [(sample_id, *split_problem(problems[sample_id])) for sample_id in sorted(problems)[:most]]
    return [{"id": sample_id, "problem": problem, "path": path} for sample_id, problem, path in split]


def pack_problems(problems: Sequence[str]) -> torch.Tensor:
    """Return joined problems, empty for good rows, as uint8 `(B, 240)`."""
    packed = torch.zeros(len(problems), _WIDTH, dtype=torch.uint8)
    for row, text in enumerate(problems):
        if text:
            content = _encode(text)[:_WIDTH]
            packed[row, : len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return packed


def read_problems(batch: Mapping[str, torch.Tensor]) -> dict[int, str]:
    """Return the problems of a batch by position; empty for a batch of a collator that has no such column."""
    packed = batch.get(PROBLEM_KEY)
    if packed is None:
        return {}
    packed = packed.cpu()
    rows = packed.any(dim=1).nonzero().flatten().tolist()
    return {row: bytes(packed[row].tolist()).rstrip(b"\x00").decode("utf-8", "replace") for row in rows}


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace").replace(b"\x00", b"")


def _shorten(text: str, width: int) -> str:
    """Return the text, or its two ends where it needs more than `width` bytes, since a path is known by its end."""
    content = _encode(text)
    if len(content) <= width:
        return content.decode()
    end = (width - 3) // 2
    start = width - 3 - end
    return f"{content[:start].decode('utf-8', 'ignore')}...{content[-end:].decode('utf-8', 'ignore')}"
