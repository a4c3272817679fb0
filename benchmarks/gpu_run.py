"""The device, the sizes and the clock that all parts of `benchmarks/gpu.py` share."""

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import peer_steps
import torch

MEBI = 2**20


class PartTimeout(Exception):
    """End of a part whose time is up."""


class Run:
    """Device, sizes and time of a run.

    Args:
        tiny: True for the CPU and sizes too small to measure anything.
        rounds: Number of timed steps of each kind.

    Attributes:
        deadline: Value of `time.perf_counter` after which no further round begins.
        found: Figures of the current part so far, which stay if the part is stopped or fails.
    """

    def __init__(self, tiny: bool, rounds: int) -> None:
        self.tiny = tiny
        self.device = "cpu" if tiny else "cuda"
        self.num_rounds = 1 if tiny else rounds
        self.deadline = float("inf")
        self.found: dict[str, Any] = {}
        self.chunk = 16 if tiny else 1024
        self.candidates = (16, 32) if tiny else (1024, 4096)

    def name_size(self, size: str) -> str:
        """Return the size of the model in place of a full one."""
        return "tiny" if self.tiny else size

    def autocast(self) -> contextlib.AbstractContextManager:
        """Return the context of bfloat16."""
        return torch.autocast(self.device, dtype=torch.bfloat16)

    def rounds(self, least: int = 1) -> Iterator[int]:
        """Yield the numbers of the rounds, fewer where the time is up but no fewer than `least`."""
        for number in range(self.num_rounds):
            if number >= least and time.perf_counter() > self.deadline:
                return
            yield number

    def wait(self) -> None:
        """Wait for the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def free(self) -> None:
        """Return memory that is not used any more."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def measure(self, step: Callable[[], Any]) -> tuple[float, float, float]:
        """Make a step, and return its seconds, and the peak of the allocator and what it rose by in MiB."""
        before = 0
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        self.wait()
        start = time.perf_counter()
        step()
        self.wait()
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated() if self.device == "cuda" else 0  # of the CPU, it is not known
        return seconds, peak / MEBI, (peak - before) / MEBI

    def take_turns(self, steps: dict[str, Callable[[], Any]], warm_up: int = 2) -> dict[str, dict[str, Any]]:
        """Make the steps in turns, and return milliseconds (median, smallest) and peak of each.

        A step that needs more memory than there is has its error in place of figures, and is not made again.
        """
        measured: dict[str, list[tuple[float, ...]]] = {name: [] for name in steps}
        errors: dict[str, str] = {}
        for name, step in steps.items():
            for _ in range(warm_up):
                if name not in errors:
                    self._try(name, step, errors)
        for _ in self.rounds():
            for name, step in steps.items():
                if name not in errors and (found := self._try(name, step, errors)) is not None:
                    measured[name].append(found)
        return {name: {"error": errors[name]} if name in errors else _sum_up(measured[name]) for name in steps}

    def _try(self, name: str, step: Callable[[], Any], errors: dict[str, str]) -> tuple[float, ...] | None:
        try:
            return self.measure(step)
        except torch.OutOfMemoryError as error:
            errors[name] = f"out of memory: {str(error)[:200]}"
            self.free()
            return None


def _sum_up(measured: list[tuple[float, ...]]) -> dict[str, Any]:
    seconds = [one[0] for one in measured]
    figures: dict[str, Any] = {"steps": len(seconds), "ms_median": round(1000 * statistics.median(seconds), 3)}
    figures["ms_min"] = round(1000 * min(seconds), 3)
    for place, name in ((1, "peak_mib"), (2, "step_mib")):  # with what else stands in memory, and the step alone
        figures[name] = round(max(one[place] for one in measured), 1)
    return figures


class MadePictures:
    """Random pictures and tokens on the device, which a batch takes by the numbers of its pairs.

    Args:
        run: Run.
        size: Size of the model.
        count: Number of different pictures.
    """

    def __init__(self, run: Run, size: str, count: int = 256) -> None:
        sizes = peer_steps.SIZES[size]
        generator = torch.Generator().manual_seed(0)
        side, tokens, vocabulary = sizes["side"], sizes["tokens"], sizes["vocabulary"]
        self._pixels = torch.randn(count, 3, side, side, generator=generator).to(run.device)
        self._tokens = torch.randint(2, vocabulary - 1, (count, tokens), generator=generator)
        self._tokens[:, -1] = vocabulary - 1
        self._tokens = self._tokens.to(run.device)
        self._device, self._count = run.device, count

    def take(self, numbers: list[int]) -> dict[str, torch.Tensor]:
        """Return the inputs of the model."""
        rows = torch.tensor(numbers).remainder(self._count).to(self._device)
        return {"pixel_values": self._pixels[rows], "input_ids": self._tokens[rows]}

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate pairs."""
        numbers = [row["sample_id"] for row in rows]
        return {**self.take(numbers), "sample_id": torch.tensor(numbers)}
