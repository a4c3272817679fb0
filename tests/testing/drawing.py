"""Leave out the drawing of figures that nobody looks at: it takes as long as the training of a tiny run."""

from collections.abc import Iterator
from contextlib import contextmanager

from matplotlib.figure import Figure

_draw = Figure.draw


def leave_out_drawing() -> None:
    """From now on figures are built and saved as always, but what is saved is empty."""
    Figure.draw = lambda figure, renderer: None


@contextmanager
def figures_drawn() -> Iterator[None]:
    """Draw figures inside the block, for tests of what they show."""
    before, Figure.draw = Figure.draw, _draw
    try:
        yield
    finally:
        Figure.draw = before
