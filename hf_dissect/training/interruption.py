"""What ends a run early from outside: it is told to end, and saves first, or one of its data workers dies."""

import os
import signal
import threading
import traceback
from contextlib import contextmanager

from hf_dissect.training.checkpoints import last_complete_checkpoint


class StoppedBySignal(SystemExit):
    """Training ended early, with a checkpoint, because the process was told to end (SIGTERM).

    As a `SystemExit` it ends the process with the status that the signal would have given it, 143.

    Attributes:
        checkpoint: the folder to go on from.
    """

    def __init__(self, checkpoint: str):
        super().__init__(128 + signal.SIGTERM)
        self.checkpoint = checkpoint

    def __str__(self) -> str:
        return f"Stopped by SIGTERM; the run can go on from {self.checkpoint}."


class DataWorkerDied(RuntimeError):
    """A process that reads and collates ended unexpectedly; the run can go on from its last checkpoint."""


@contextmanager
def death_of_a_worker_told(output_dir: str):
    """Turn torch's error about a dead data worker, which may come at any moment, into one that says what to do."""
    try:
        yield
    except Exception as error:
        if (reason := _death_of_a_worker(error)) is None:
            raise
        raise DataWorkerDied(
            f"A data worker died ({reason}). When memory ran out, use fewer workers "
            "(data.num_workers, dataloader_num_workers) or a smaller data.shuffle_buffer. Resume from the last "
            f"checkpoint: {last_complete_checkpoint(output_dir) or 'none yet'}."
        ) from error


def _death_of_a_worker(error: BaseException | None) -> str | None:
    """What an error, or one it came from, says of a dead worker: torch's may strike where others are handled."""
    while error is not None:
        if _tells_of_a_dead_worker(error):
            return (str(error).splitlines() or [type(error).__name__])[0]
        error = error.__cause__ or error.__context__
    return None


def _tells_of_a_dead_worker(error: BaseException) -> bool:
    if "DataLoader worker" in str(error):
        return True
    # It died while a batch was taken over from it, and this process noticed that before its death.
    modules = {frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(error.__traceback__)}
    lost = isinstance(error, ConnectionError | EOFError | FileNotFoundError)
    return lost and "torch.multiprocessing.reductions" in modules


class StopRequest:
    """Whether the process was told to end. A second SIGTERM ends it at once."""

    def __init__(self):
        self.made = False

    @contextmanager
    def heeded(self):
        """Take SIGTERM as a request inside the block (in the main thread, where alone Python can)."""
        self.made = False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        process, before = os.getpid(), signal.getsignal(signal.SIGTERM)

        def note(number, frame):
            if self.made or os.getpid() != process:  # a second time, or a worker that inherited this
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGTERM)
            self.made = True

        signal.signal(signal.SIGTERM, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)
