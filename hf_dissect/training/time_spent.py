"""Wall-clock of the parts of a run, so that selection is charged with what it costs."""

import time
from collections import defaultdict
from collections.abc import Mapping
from contextlib import contextmanager


class TimeSpent:
    """Seconds by part ("data", "scoring", ...); what is measured inside another part counts for the inner one only."""

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: list[list] = []  # [part, its start, seconds of the finished parts inside it]

    @contextmanager
    def measure(self, part: str):
        """Charge the time of the block to `part`."""
        self._open.append([part, time.perf_counter(), 0.0])
        try:
            yield
        finally:
            _, start, inside = self._open.pop()
            elapsed = time.perf_counter() - start
            self.seconds[part] += elapsed - inside
            if self._open:
                self._open[-1][2] += elapsed

    def __getitem__(self, part: str) -> float:
        return self.seconds.get(part, 0.0)

    def so_far(self) -> dict[str, float]:
        """Seconds by part, what is under way included."""
        seconds = defaultdict(float, self.seconds)
        end = time.perf_counter() if self._open else 0.0
        for part, start, inside in reversed(self._open):
            seconds[part] += end - start - inside
            end = start
        return dict(seconds)

    @property
    def total(self) -> float:
        """Seconds of everything measured, what is under way included."""
        return sum(self.so_far().values())

    def add(self, seconds: Mapping[str, float]) -> None:
        """Count what an earlier part of the run took."""
        for part, spent in seconds.items():
            self.seconds[part] += spent
