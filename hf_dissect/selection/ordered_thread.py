"""A thread that does one thing after the other next to the training, such as exchanges that nobody waits for yet."""

import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch


class OrderedThread:
    """Thread that calls functions in the order in which they were given to it, as on every other rank."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue = queue.SimpleQueue()
        self._last: Future | None = None
        # A daemon, so that a process whose partner died does not wait for it at its end.
        threading.Thread(target=_work, args=(self._calls,), name="ledger", daemon=True).start()
        weakref.finalize(self, self._calls.put, None)

    def submit(self, function: Callable[[], Any]) -> Future:
        """Call a function later, after those before it, and return the future of its result."""
        future: Future = Future()
        self._calls.put((future, function))
        self._last = future
        return future

    def wait(self) -> None:
        """Wait until all calls have ended, and raise the error of the last, or of one that stopped it."""
        if self._last is not None:
            last, self._last = self._last, None
            last.result()


@torch.no_grad()
def _work(calls: queue.SimpleQueue) -> None:
    failed: BaseException | None = None
    while (call := calls.get()) is not None:
        future, function = call
        try:
            if failed is not None:
                # What comes after an exchange that failed would meet that of another step on the other ranks.
                raise failed
            future.set_result(function())
        except BaseException as error:
            failed = error
            future.set_exception(error)
        del call, future, function
