"""Publisher of a run, which sends checkpoints and the finished run folder to the Hub, without anything private."""

import logging
import os
import shutil
from concurrent import futures
from concurrent.futures import Future
from pathlib import Path

from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import HubStrategy, SaveStrategy

from hf_dissect.hub.published_files import CARD_FILE, CARDS, RECIPE_FILE, remove_paths
from hf_dissect.hub.push import Push, publish
from hf_dissect.hub.repository import HubError, Repository
from hf_dissect.hub.shared_recipe import format_published_recipe
from hf_dissect.recipe.file import read_settings

logger = logging.getLogger(__name__)

STAGING_PREFIX = "pushing-"
"""Prefix of the folders, inside a run folder, with the files of checkpoints that are being sent."""

_CARDS_FOLDER = "cards"
# The first is a pickle that holds paths and the token, the second is a draft of a card by PEFT.
_NOT_IN_CHECKPOINTS = ("training_args.bin", CARD_FILE)


class Publisher:
    """Publisher of a run on the Hub, for the first process only.

    It follows the arguments of the Trainer (`hub_model_id`, `hub_strategy`, ...) and publishes the same files as
    `hf-dissect push`. With `hub_strategy` "checkpoint" or "all_checkpoints", it also sends the checkpoints, without
    `training_args.bin`, so that another machine can resume from them.

    Args:
        args: Arguments of the run.
        model_in_checkpoint: Folder, within a checkpoint, of the published model; "" for the checkpoint itself.

    Attributes:
        repository: Repository of the run; None before `open` is called.
    """

    def __init__(self, args: TrainingArguments, model_in_checkpoint: str = "") -> None:
        self.args = args
        self.model_in_checkpoint = model_in_checkpoint
        self.repository: Repository | None = None
        self._jobs: list[Future] = []

    def open(self, token: str | None = None, private: bool | None = None, revision: str | None = None) -> str:
        """Create the repository, or check that an existing one can be written to.

        Args:
            token: Token of the user; None for that of the arguments.
            private: True to make a new repository private; None for the value in the arguments.
            revision: Branch to write to; None for that of the arguments.

        Returns:
            Id of the repository.

        Raises:
            HubError: The repository cannot be written to.
        """
        self.wait()
        self.repository = Repository.open(
            self.args.hub_model_id or self._run_folder.absolute().name,
            private=self.args.hub_private_repo if private is None else private,
            revision=revision or self.args.hub_revision,
            token=token or self.args.hub_token,
        )
        return self.repository.repo_id

    def wait(self) -> None:
        """Wait until all checkpoints are sent."""
        futures.wait(self._jobs)

    def push(self, message: str, blocking: bool = True) -> Push | Future:
        """Publish the run folder in its present state, after `open`.

        Args:
            message: Message of the commit.
            blocking: True to wait until all files are on the Hub; False to return a future.

        Returns:
            Result of the push, or a future of it.

        Raises:
            HubError: The Hub cannot be written to, or a file holds something private.
        """
        self.wait()
        folder, repository = self._run_folder, self._get_repository()
        if not blocking:
            return repository.api.run_as_future(publish, repository, folder, message=message)
        try:
            return publish(repository, folder, message=message)
        except HubError as error:
            retry = f"hf-dissect push {folder} {repository.repo_id}"
            raise HubError(f"{error} The run itself is complete; publish it later by: {retry}") from error

    @property
    def is_due(self) -> bool:
        """True if a checkpoint that was just written is to be sent."""
        if self.args.hub_strategy == HubStrategy.END:
            return False
        return self.args.hub_always_push or not self._is_sending

    def push_checkpoint(self, checkpoint: str | Path, state: TrainerState) -> None:
        """Send a checkpoint in the background; an error is logged and does not end the training.

        Args:
            checkpoint: Folder of the checkpoint.
            state: State of the Trainer at the checkpoint.
        """
        by_steps = self.args.save_strategy == SaveStrategy.STEPS
        progress = f"step {state.global_step}" if by_steps else f"epoch {round(state.epoch)}"
        if not self._is_sending:
            self._jobs = []
            for left in self._run_folder.glob(f"{STAGING_PREFIX}*"):  # by a run that was killed
                shutil.rmtree(left, ignore_errors=True)
        staged, api = self._stage(Path(checkpoint)), self._get_repository().api
        job = api.run_as_future(self._publish_checkpoint, staged, f"Training in progress, {progress}")
        self._jobs.append(job)

    @property
    def _is_sending(self) -> bool:
        return not all(job.done() for job in self._jobs)

    @property
    def _run_folder(self) -> Path:
        return Path(str(self.args.output_dir))

    def _get_repository(self) -> Repository:
        if self.repository is None:
            raise HubError("The repository is not open; call Publisher.open first.")
        return self.repository

    def _stage(self, checkpoint: Path) -> Path:
        """Copy a checkpoint and the current card to a folder, because both may be gone before they are sent."""
        staged = self._run_folder / f"{STAGING_PREFIX}{checkpoint.name}"
        shutil.rmtree(staged, ignore_errors=True)
        left_out = shutil.ignore_patterns(*_NOT_IN_CHECKPOINTS)
        shutil.copytree(checkpoint, staged / checkpoint.name, copy_function=_link, ignore=left_out)
        (staged / _CARDS_FOLDER).mkdir()
        for card in (self._run_folder / name for name in CARDS):
            if card.is_file():
                _link(card, staged / _CARDS_FOLDER / card.name)
        return staged

    def _publish_checkpoint(self, staged: Path, message: str) -> None:
        checkpoint = staged / staged.name.removeprefix(STAGING_PREFIX)
        try:
            model = checkpoint / self.model_in_checkpoint
            publish(self._get_repository(), model, message=message, cards_in=staged / _CARDS_FOLDER)
            if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
                self._send_whole(checkpoint, f"{message}, checkpoint")
        except (OSError, ValueError) as error:
            logger.warning("%s was not pushed, and training continues: %s", checkpoint.name, error)
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def _send_whole(self, checkpoint: Path, message: str) -> None:
        repository = self._get_repository()
        keeps_all = self.args.hub_strategy == HubStrategy.ALL_CHECKPOINTS
        below = checkpoint.name if keeps_all else "last-checkpoint"
        files: dict[str, Path | bytes] = {}
        for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
            name = path.relative_to(checkpoint).as_posix()
            content: Path | bytes = path
            if path.name == RECIPE_FILE:
                content = format_published_recipe(read_settings(path), repository.repo_id)[0].encode()
            elif path.name.endswith(("config.json", "trainer_state.json")):
                content = remove_paths(path)
            files[f"{below}/{name}"] = content
        repository.upload(files, message, outdated=lambda path: path.startswith(f"{below}/"))


def _link(source: str | Path, target: str | Path) -> None:
    """Link a file to another name, which takes no space; copy it if the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
