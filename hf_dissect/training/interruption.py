"""Interruption of a run from outside: SIGTERM, which ends it with a checkpoint, and the death of a data worker.

The Trainer ends on SIGTERM without a checkpoint. Here the signal is a request: the ranks learn of it in their next
exchange and all stop after the same step.
"""

import logging
import os
import signal
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from hf_dissect.training.checkpoints import find_last_checkpoint

logger = logging.getLogger(__name__)


class StoppedBySignal(SystemExit):
    """Exit after SIGTERM, with a checkpoint to resume from.

    The exit status of the process is 143, as without a handler of the signal.

    Args:
        checkpoint: Folder to resume from.
    """

    def __init__(self, checkpoint: str) -> None:
        super().__init__(128 + signal.SIGTERM)
        self.checkpoint = checkpoint

    def __str__(self) -> str:
        return f"Stopped by SIGTERM; the run can be resumed from {self.checkpoint}."


class DataWorkerDied(RuntimeError):
    """Error of a data worker that ended unexpectedly; the run can be resumed from its last checkpoint."""


@contextmanager
def explain_dead_worker(output_dir: str) -> Iterator[None]:
    """Replace an error of torch about a dead data worker inside the block by one that says what to do.

    Args:
        output_dir: Folder of the run.

    Raises:
        DataWorkerDied: A data worker died.
    """
    try:
        yield
    except Exception as error:
        if (reason := _find_dead_worker(error)) is None:
            raise
        raise DataWorkerDied(
            f"A data worker died ({reason}). When memory ran out, use fewer workers "
            "(data.num_workers, dataloader_num_workers) or a smaller data.shuffle_buffer. Resume from the last "
            f"checkpoint: {find_last_checkpoint(output_dir) or 'none yet'}."
        ) from error


def _find_dead_worker(error: BaseException | None) -> str | None:
    """Return the message about a dead worker in an error or its causes; None without one."""
    while error is not None:
        if _is_about_dead_worker(error):
            return (str(error).splitlines() or [type(error).__name__])[0]
        error = error.__cause__ or error.__context__
    return None


def _is_about_dead_worker(error: BaseException) -> bool:
    if "DataLoader worker" in str(error):
        return True
    # A worker that dies while it hands over a batch shows as a lost connection before its death is noticed.
    modules = {frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(error.__traceback__)}
    lost = isinstance(error, ConnectionError | EOFError | FileNotFoundError)
    return lost and "torch.multiprocessing.reductions" in modules


class StopRequest:
    """Request to end the run after the current step, made by SIGTERM; a second SIGTERM ends the process at once.

    Attributes:
        made: True if this process received the signal.
        granted: True if any process received it, so that the run ends after the current step.
    """

    def __init__(self) -> None:
        self.made = self.granted = False

    def grant_if(self, asked: bool) -> None:
        """Grant the request if it was made on any process.

        Args:
            asked: True if any process received the signal, the same on all processes.
        """
        if asked and not self.granted:
            logger.warning("SIGTERM: a checkpoint is written after this step, then the run ends.")
        self.granted = self.granted or bool(asked)

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Treat SIGTERM as a request inside the block, if it runs in the main thread, as Python requires."""
        self.made = self.granted = False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        process, before = os.getpid(), signal.getsignal(signal.SIGTERM)

        def note(number: int, frame: FrameType | None) -> None:
            if self.made or os.getpid() != process:  # a second signal, or a worker that inherited the handler
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGTERM)
            self.made = True

        signal.signal(signal.SIGTERM, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)
