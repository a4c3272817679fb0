"""Wall-clock of the parts of a run, so that selection is charged with what it costs."""

import time
from collections import defaultdict
from contextlib import contextmanager


class TimeSpent:
    """Seconds by part ("data", "scoring", ...); what is measured inside another part counts for the inner one only."""

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner = [0.0]
        self._outermost_start = 0.0

    @contextmanager
    def measure(self, part: str):
        """Charge the time of the block to `part`."""
        start = time.perf_counter()
        if len(self._inner) == 1:
            self._outermost_start = start
        self._inner.append(0.0)
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            self.seconds[part] += elapsed - self._inner.pop()
            self._inner[-1] += elapsed

    def __getitem__(self, part: str) -> float:
        return self.seconds.get(part, 0.0)

    @property
    def total(self) -> float:
        """Seconds of everything measured, what is under way included."""
        finished = self._inner[0]
        return finished if len(self._inner) == 1 else finished + time.perf_counter() - self._outermost_start
