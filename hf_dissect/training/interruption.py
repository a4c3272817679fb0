"""Interruption of a run from outside: SIGTERM, which ends it with a checkpoint, and the death of a data worker.

The Trainer ends on SIGTERM without a checkpoint. Here the signal is a request: the ranks learn of it in their next
exchange and all stop after the same step.
"""

import logging
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
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


class StoppedAfterTraining(StoppedBySignal):
    """Exit after SIGTERM that came after the last step, with the model and the figures so far in the run folder.

    Args:
        folder: Run folder.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(str(find_last_checkpoint(folder)))
        self.folder = folder

    def __str__(self) -> str:
        return (
            f"Stopped by SIGTERM after the last step; the model is in {self.folder}, and metrics.json there has the "
            f"figures that were ready. Compute others with: hf-dissect evaluate {self.folder}."
        )


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
        if (reason := find_dead_worker(error)) is None:
            raise
        raise DataWorkerDied(
            f"A data worker died ({reason}). When memory ran out, use fewer workers "
            "(data.num_workers, dataloader_num_workers) or a smaller data.shuffle_buffer. Resume from the last "
            f"checkpoint: {find_last_checkpoint(output_dir) or 'none yet'}."
        ) from error


def find_dead_worker(error: BaseException | None) -> str | None:
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
    """Request to end the run, made by SIGTERM; a second SIGTERM ends the process at once.

    In training, the run ends after the current step. After it, see `interrupt`.

    Attributes:
        made: True if this process received the signal.
        granted: True if any process received it, so that the run ends after the current step.
    """

    def __init__(self) -> None:
        self.made = self.granted = False
        self._listens = self._holds = False
        self._make_exit: Callable[[], BaseException] | None = None  # inside of `interrupt`

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
        """Treat SIGTERM as a request inside the block, if it runs in the main thread, as Python requires.

        A block inside of another one changes nothing.
        """
        if self._listens:
            yield
            return
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
            self._exit_if_due()

        signal.signal(signal.SIGTERM, note)
        self._listens = True
        try:
            yield
        finally:
            self._listens = False
            signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)

    @contextmanager
    def interrupt(self, make_exit: Callable[[], BaseException], asked: bool) -> Iterator[None]:
        """End the block as soon as SIGTERM arrives, or at its beginning if it has arrived before.

        Args:
            make_exit: Function that returns the exception to raise.
            asked: True if any process has received the signal, the same on all processes.
        """
        if asked:
            raise make_exit()
        self._make_exit = make_exit
        try:
            yield
        finally:
            self._make_exit = None

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Let the block end before SIGTERM is answered, because it writes files that belong together."""
        self._holds = True
        try:
            yield
        finally:
            self._holds = False
        self._exit_if_due()

    def _exit_if_due(self) -> None:
        if self.made and not self._holds and self._make_exit is not None:
            raise self._make_exit()
