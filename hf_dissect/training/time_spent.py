"""Wall-clock time of the parts of a run, which shows the cost of the selection."""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class TimeSpent:
    """Seconds of each part of a run, such as "data" or "scoring".

    Time that is measured inside another part counts for the inner part only.

    Attributes:
        seconds: Seconds of the finished measurements, by part.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: list[list] = []  # [part, its start, seconds of the finished parts inside it]

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Add the time of the block to `part`."""
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

    def measure_so_far(self) -> dict[str, float]:
        """Return the seconds by part, including unfinished measurements."""
        seconds = defaultdict(float, self.seconds)
        end = time.perf_counter() if self._open else 0.0
        for part, start, inside in reversed(self._open):
            seconds[part] += end - start - inside
            end = start
        return dict(seconds)

    @property
    def total(self) -> float:
        """Seconds of all parts, including unfinished measurements."""
        return sum(self.measure_so_far().values())

    def state_dict(self) -> dict[str, float]:
        """Return the seconds by part so far."""
        return self.measure_so_far()

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Add the seconds of the run before it was resumed."""
        for part, spent in state.items():
            self.seconds[part] += spent
