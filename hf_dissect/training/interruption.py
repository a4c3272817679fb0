"""Early ends of a run from outside: SIGTERM, after which it saves first, and the death of a data worker.

Written by hand because the Trainer ends on SIGTERM without a checkpoint, and because all ranks have to stop after the
same step: the request is only noted here, and the ranks agree on it in the exchange before each selection.
"""

import logging
import os
import signal
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from hf_dissect.training.checkpoints import last_complete_checkpoint

logger = logging.getLogger(__name__)


class StoppedBySignal(SystemExit):
    """End of the training, with a checkpoint, because the process was asked to end (SIGTERM).

    As a `SystemExit` it gives the process the status that the signal would have given it, 143.

    Attributes:
        checkpoint: Folder to resume from.
    """

    def __init__(self, checkpoint: str):
        super().__init__(128 + signal.SIGTERM)
        self.checkpoint = checkpoint

    def __str__(self) -> str:
        return f"Stopped by SIGTERM; the run can be resumed from {self.checkpoint}."


class DataWorkerDied(RuntimeError):
    """Unexpected end of a process that reads and collates; the run can be resumed from its last checkpoint."""


@contextmanager
def explain_dead_worker(output_dir: str) -> Iterator[None]:
    """Turn torch's error about a dead data worker, which may come at any moment, into one that says what to do."""
    try:
        yield
    except Exception as error:
        if (reason := _find_dead_worker(error)) is None:
            raise
        raise DataWorkerDied(
            f"A data worker died ({reason}). When memory ran out, use fewer workers "
            "(data.num_workers, dataloader_num_workers) or a smaller data.shuffle_buffer. Resume from the last "
            f"checkpoint: {last_complete_checkpoint(output_dir) or 'none yet'}."
        ) from error


def _find_dead_worker(error: BaseException | None) -> str | None:
    """Return what an error, or one that it came from, says of a dead worker; None if it is about something else."""
    while error is not None:
        if _is_of_dead_worker(error):
            return (str(error).splitlines() or [type(error).__name__])[0]
        error = error.__cause__ or error.__context__
    return None


def _is_of_dead_worker(error: BaseException) -> bool:
    if "DataLoader worker" in str(error):
        return True
    # It died while a batch was taken over from it, and this process noticed that before its death.
    modules = {frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(error.__traceback__)}
    lost = isinstance(error, ConnectionError | EOFError | FileNotFoundError)
    return lost and "torch.multiprocessing.reductions" in modules


class StopRequest:
    """Request to end the process. A second SIGTERM ends it at once.

    Attributes:
        made: Whether this process was asked.
        granted: Whether the run ends after the current step, since any process was asked.
    """

    def __init__(self) -> None:
        self.made = self.granted = False

    def grant_if(self, asked: bool) -> None:
        """End the run after the current step if any process was asked; all processes have to agree on it."""
        if asked and not self.granted:
            logger.warning("SIGTERM: a checkpoint is written after this step, then the run ends.")
        self.granted = self.granted or bool(asked)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGTERM as a request inside the block (in the main thread, where alone Python can)."""
        self.made = self.granted = False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        process, before = os.getpid(), signal.getsignal(signal.SIGTERM)

        def note(number: int, frame: FrameType | None) -> None:
            if self.made or os.getpid() != process:  # a second time, or a worker that inherited this
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGTERM)
            self.made = True

        signal.signal(signal.SIGTERM, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)
