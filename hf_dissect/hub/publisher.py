"""A Trainer that publishes runs on the Hub, while they go on and at their end, without anything pickled or private."""

import logging
import os
import shutil
from concurrent.futures import Future
from pathlib import Path

from transformers import Trainer
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import PushInProgress

from hf_dissect.hub.published_files import CARD_FILE, CARDS, RECIPE_FILE, remove_paths
from hf_dissect.hub.push import Push, publish
from hf_dissect.hub.repository import HubError, Repository
from hf_dissect.hub.shared_recipe import format_published_recipe
from hf_dissect.recipe.file import read_settings

logger = logging.getLogger(__name__)

STAGING_PREFIX = "pushing-"
"""Of the folders, inside a run folder, that hold the files of a checkpoint until they are on the Hub."""

_CARDS_FOLDER = "cards"
# A pickle with paths and the token in it; PEFT's draft of a card.
_NOT_IN_CHECKPOINTS = ("training_args.bin", CARD_FILE)


class PublishingTrainer(Trainer):
    """Keeps the interface of the Trainer (`push_to_hub`, `hub_strategy`), and publishes what `hf-dissect push` does.

    With a `hub_strategy` of "checkpoint" or "all_checkpoints", whole checkpoints are sent as well, to go on from:
    all of their files but `training_args.bin`.

    Attributes:
        model_in_checkpoint: folder, within a checkpoint, of the model that is published; "" for the checkpoint itself.
    """

    model_in_checkpoint = ""

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository, or make sure that it can be written to (`HubError`)."""
        if not self.is_world_process_zero():
            return
        self._repository = Repository.open(
            self.args.hub_model_id or Path(self.args.output_dir).absolute().name,
            private=self.args.hub_private_repo if private is None else private,
            revision=self.args.hub_revision,
            token=token or self.args.hub_token,
        )
        self.hub_model_id = self._repository.repo_id
        self.push_in_progress = None

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card_arguments,
    ) -> Push | Future | None:
        """Save the model and publish the run folder; called on all processes, done by the first.

        Args:
            commit_message: of the commit.
            blocking: whether to wait until all is on the Hub.
            token, revision, private: as of `transformers.Trainer.push_to_hub`.
            card_arguments: of `create_model_card`.

        Returns:
            What was published, a future of it if not `blocking`, None on other processes than the first.

        Raises:
            HubError: the Hub cannot be written to, or a file holds something private.
        """
        if token or revision or self.hub_model_id is None:
            self._open_another(token, revision, private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**card_arguments)
        return self.push_run_folder(commit_message, blocking)

    def push_run_folder(self, commit_message: str = "End of training", blocking: bool = True) -> Push | Future | None:
        """Publish the run folder as it is, see `push_to_hub`."""
        if not self.is_world_process_zero():
            return None
        if self.hub_model_id is None:
            self.init_hf_repo()
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self._finish_current_push()
        folder, repository = Path(self.args.output_dir), self._repository
        if not blocking:
            return repository.api.run_as_future(publish, repository, folder, message=commit_message)
        try:
            return publish(repository, folder, message=commit_message)
        except HubError as error:
            again = f"hf-dissect push {folder} {repository.repo_id}"
            raise HubError(f"{error} The run itself is complete; publish it later by: {again}") from error

    def _open_another(self, token: str | None, revision: str | None, private: bool | None) -> None:
        self._finish_current_push()
        given, self.args.hub_revision = self.args.hub_revision, revision or self.args.hub_revision
        try:
            self.init_hf_repo(token, private)
        finally:
            self.args.hub_revision = given

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if not self.args.hub_always_push and self.push_in_progress is not None and not self.push_in_progress.is_done():
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if is_free := self.push_in_progress is None or self.push_in_progress.is_done():
            for left in Path(self.args.output_dir).glob(f"{STAGING_PREFIX}*"):  # by a run that was killed
                shutil.rmtree(left, ignore_errors=True)
        staged = self._stage(Path(checkpoint_folder))
        by_steps = self.args.save_strategy == SaveStrategy.STEPS
        so_far = f"step {self.state.global_step}" if by_steps else f"epoch {round(self.state.epoch)}"
        job = self._repository.api.run_as_future(self._publish_checkpoint, staged, f"Training in progress, {so_far}")
        if is_free:
            self.push_in_progress = PushInProgress([job])
        else:
            self.push_in_progress.jobs.append(job)

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
        """Publish the model of a checkpoint and, if asked for, the checkpoint itself; a failure ends no training."""
        checkpoint = staged / staged.name.removeprefix(STAGING_PREFIX)
        try:
            model = checkpoint / self.model_in_checkpoint
            publish(self._repository, model, message=message, cards_in=staged / _CARDS_FOLDER)
            if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
                self._send_whole(checkpoint, f"{message}, checkpoint")
        except (OSError, ValueError) as error:
            logger.warning("%s was not pushed, and training goes on: %s", checkpoint.name, error)
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def _send_whole(self, checkpoint: Path, message: str) -> None:
        keeps_all = self.args.hub_strategy == HubStrategy.ALL_CHECKPOINTS
        below = checkpoint.name if keeps_all else "last-checkpoint"
        files = {}
        for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
            name, content = path.relative_to(checkpoint).as_posix(), path
            if path.name == RECIPE_FILE:
                content = format_published_recipe(read_settings(path), self._repository.repo_id)[0].encode()
            elif path.name.endswith(("config.json", "trainer_state.json")):
                content = remove_paths(path)
            files[f"{below}/{name}"] = content
        self._repository.upload(files, message, outdated=lambda path: path.startswith(f"{below}/"))


def _link(source: str, target: str) -> None:
    """Another name for a file, which costs no space; a copy where the file system knows no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
