"""A progress bar for each pass over data that takes more than a few seconds."""

import sys
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from tqdm.auto import tqdm

from hf_dissect.distributed import get_rank_and_world_size

DELAY = 2.0
"""Seconds until the bar appears; a shorter pass shows none."""

_Item = TypeVar("_Item")


def show_pass(
    items: Iterable[_Item], name: str, *, total: int | None = None, unit: str = "batch", shown: bool = True
) -> Iterator[_Item]:
    """Yield items, with a progress bar on the first process if it takes more than `DELAY` seconds.

    Args:
        items: Items to pass over.
        name: Name of the pass.
        total: Number of items; None for their length, if they have one.
        unit: Word for an item.
        shown: False to show no bar.

    Yields:
        The items.
    """
    if not shown or get_rank_and_world_size()[0] != 0:
        yield from items
        return
    if total is None and isinstance(items, Sized):
        total = len(items)
    with make_bar(name, total, unit) as bar:
        for item in items:
            yield item
            bar.update()


def make_bar(name: str, total: int | None, unit: str = "batch") -> tqdm:
    """Return a progress bar that appears after `DELAY` seconds and goes when it is closed."""
    # In a log file each refresh is a new line.
    interval = 0.1 if sys.stderr.isatty() else 5.0
    return tqdm(desc=name, total=total, unit=unit, dynamic_ncols=True, delay=DELAY, mininterval=interval, leave=False)
