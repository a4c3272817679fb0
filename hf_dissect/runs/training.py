"""Training with one progress bar, which the runs of all kinds share."""

from pathlib import Path

from transformers import Trainer
from transformers.trainer_callback import ProgressCallback

from hf_dissect.training.progress import RunProgress


def show_progress(trainer: Trainer, name: str | None = None) -> None:
    """Replace the Trainer's progress bars by one for the whole run; without bars, do nothing.

    Args:
        trainer: Trainer of the run.
        name: Words in front of the bar; None for none.
    """
    if not trainer.args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(RunProgress)
        trainer.add_callback(RunProgress(name))


def train_to_end(trainer: Trainer, checkpoint: Path | None) -> None:
    """Train; if an error ends the training, close the bar of `show_progress`.

    Args:
        trainer: Trainer of the run.
        checkpoint: Checkpoint to resume from; None to train from the start.
    """
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except BaseException:
        if isinstance(progress := trainer.pop_callback(RunProgress), RunProgress):
            progress.close()  # an open bar would be drawn once more below the error
        raise
