"""Publisher of a run: sends its folder to the Hub at the end, and checkpoints while it trains; nothing private."""

import logging
import os
import shutil
from concurrent.futures import Future
from pathlib import Path

from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import PushInProgress

from hf_dissect.hub.published_files import CARD_FILE, CARDS, RECIPE_FILE, remove_paths
from hf_dissect.hub.push import Push, publish
from hf_dissect.hub.repository import HubError, Repository
from hf_dissect.hub.shared_recipe import format_published_recipe
from hf_dissect.recipe.file import read_settings

logger = logging.getLogger(__name__)

STAGING_PREFIX = "pushing-"
"""Prefix of the folders, inside a run folder, that hold the files of a checkpoint until they are on the Hub."""

_CARDS_FOLDER = "cards"
# A pickle with paths and the token in it; PEFT's draft of a card.
_NOT_IN_CHECKPOINTS = ("training_args.bin", CARD_FILE)


class Publisher:
    """Sends a run to its repository; used by the first process alone.

    It honours the arguments of the Trainer (`hub_model_id`, `hub_strategy`, ...) and publishes the files that
    `hf-dissect push` publishes. With a `hub_strategy` of "checkpoint" or "all_checkpoints", whole checkpoints are sent
    as well, so that another machine can resume from them: all of their files but `training_args.bin`.

    Args:
        args: Arguments of the run.
        model_in_checkpoint: Folder, within a checkpoint, of the model that is published; "" for the checkpoint itself.

    Attributes:
        repository: The repository, None until `open` was called.
    """

    def __init__(self, args: TrainingArguments, model_in_checkpoint: str = ""):
        self.args = args
        self.model_in_checkpoint = model_in_checkpoint
        self.repository: Repository | None = None
        self._jobs: PushInProgress | None = None

    def open(self, token: str | None = None, private: bool | None = None, revision: str | None = None) -> str:
        """Create the repository, or check that it can be written to, and return its id.

        Args:
            token: Token of the user; None for that of the arguments.
            private: Whether a new repository is private; None for the setting of the arguments.
            revision: Branch to write to; None for that of the arguments.

        Raises:
            HubError: it cannot be written to.
        """
        self.wait()
        self.repository = Repository.open(
            self.args.hub_model_id or Path(self.args.output_dir).absolute().name,
            private=self.args.hub_private_repo if private is None else private,
            revision=revision or self.args.hub_revision,
            token=token or self.args.hub_token,
        )
        return self.repository.repo_id

    def wait(self) -> None:
        """Wait until the checkpoints that are being sent have arrived."""
        if self._jobs is not None and not self._jobs.is_done():
            self._jobs.wait_until_done()

    def push(self, message: str, blocking: bool = True) -> Push | Future:
        """Publish the run folder as it is; `open` comes before.

        Args:
            message: Message of the commit.
            blocking: Whether to wait until everything is on the Hub; otherwise a future is returned.

        Raises:
            HubError: the Hub cannot be written to, or a file holds something private.
        """
        self.wait()
        folder, repository = Path(self.args.output_dir), self.repository
        if not blocking:
            return repository.api.run_as_future(publish, repository, folder, message=message)
        try:
            return publish(repository, folder, message=message)
        except HubError as error:
            retry = f"hf-dissect push {folder} {repository.repo_id}"
            raise HubError(f"{error} The run itself is complete; publish it later by: {retry}") from error

    @property
    def is_due(self) -> bool:
        """Whether a checkpoint that was just written is to be sent."""
        if self.args.hub_strategy == HubStrategy.END:
            return False
        return self.args.hub_always_push or self._jobs is None or self._jobs.is_done()

    def push_checkpoint(self, checkpoint: str | Path, state: TrainerState) -> None:
        """Begin to send the checkpoint of a state; its failure is logged and does not end the training."""
        by_steps = self.args.save_strategy == SaveStrategy.STEPS
        progress = f"step {state.global_step}" if by_steps else f"epoch {round(state.epoch)}"
        is_free = self._jobs is None or self._jobs.is_done()
        if is_free:
            for left in Path(self.args.output_dir).glob(f"{STAGING_PREFIX}*"):  # by a run that was killed
                shutil.rmtree(left, ignore_errors=True)
        staged = self._stage(Path(checkpoint))
        job = self.repository.api.run_as_future(self._publish_checkpoint, staged, f"Training in progress, {progress}")
        if is_free:
            self._jobs = PushInProgress([job])
        else:
            self._jobs.jobs.append(job)

    def _stage(self, checkpoint: Path) -> Path:
        """Hold a checkpoint, and the card as it is now, by other names: both may be gone before they are sent."""
        staged = Path(self.args.output_dir, f"{STAGING_PREFIX}{checkpoint.name}")
        shutil.rmtree(staged, ignore_errors=True)
        left_out = shutil.ignore_patterns(*_NOT_IN_CHECKPOINTS)
        shutil.copytree(checkpoint, staged / checkpoint.name, copy_function=_link, ignore=left_out)
        (staged / _CARDS_FOLDER).mkdir()
        for card in (Path(self.args.output_dir, name) for name in CARDS):
            if card.is_file():
                _link(card, staged / _CARDS_FOLDER / card.name)
        return staged

    def _publish_checkpoint(self, staged: Path, message: str) -> None:
        checkpoint = staged / staged.name.removeprefix(STAGING_PREFIX)
        try:
            model = checkpoint / self.model_in_checkpoint
            publish(self.repository, model, message=message, cards_in=staged / _CARDS_FOLDER)
            if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
                self._send_whole(checkpoint, f"{message}, checkpoint")
        except (OSError, ValueError) as error:
            logger.warning("%s was not pushed, and training continues: %s", checkpoint.name, error)
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def _send_whole(self, checkpoint: Path, message: str) -> None:
        keeps_all = self.args.hub_strategy == HubStrategy.ALL_CHECKPOINTS
        below = checkpoint.name if keeps_all else "last-checkpoint"
        files: dict[str, Path | bytes] = {}
        for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
            name = path.relative_to(checkpoint).as_posix()
            content: Path | bytes = path
            if path.name == RECIPE_FILE:
                content = format_published_recipe(read_settings(path), self.repository.repo_id)[0].encode()
            elif path.name.endswith(("config.json", "trainer_state.json")):
                content = remove_paths(path)
            files[f"{below}/{name}"] = content
        self.repository.upload(files, message, outdated=lambda path: path.startswith(f"{below}/"))


def _link(source: str | Path, target: str | Path) -> None:
    """Give a file another name, which costs no space; copy it where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
