"""Publishes a finished run as a model repository: weights, processor, recipe, figures and card, in one commit."""

from dataclasses import dataclass
from pathlib import Path

from hf_dissect.hub.published_files import WEIGHTS, is_published, published_files
from hf_dissect.hub.repository import HubError, Repository


@dataclass(frozen=True)
class Push:
    """What was published.

    Attributes:
        url: of the repository, for a browser.
        repo_id: `USER/REPO`.
        files: paths in the repository.
        left_out: what stayed behind, as it is of one machine only: settings of the recipe, an adapter's base.
    """

    url: str
    repo_id: str
    files: list[str]
    left_out: list[str]


def push_run(
    run: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    message: str | None = None,
) -> Push:
    """Publish a run folder; what an earlier push of it left there and no longer belongs to it goes.

    Args:
        run: folder of a finished run.
        repo_id: `USER/REPO`, or a name alone for a repository of the user's own; it is created if it is not there.
        private: of a new repository; None for the default of its owner.
        revision: branch to write to, created if it is not there; None for the main one.
        token: of the user; None for the one that is logged in.
        message: of the commit.

    Raises:
        HubError: the folder holds no finished run or something private, or see `Repository.open` and `upload`.
    """
    folder = Path(run)
    check_finished(folder)
    published_files(folder, repo_id)  # what may not go out is told before anything is created
    repository = Repository.open(repo_id, private=private, revision=revision, token=token)
    return publish(repository, folder, message=message or "Upload a run of hf_dissect")


def publish(repository: Repository, folder: Path, *, message: str, cards_in: Path | None = None) -> Push:
    """Publish what `published_files` finds in a run's folder or in a checkpoint, in place of an earlier publication.

    Raises:
        HubError: a file holds something private, or see `Repository.upload`.
    """
    files, left_out = published_files(folder, repository.repo_id, cards_in)
    repository.upload(files, message, outdated=is_published)
    return Push(repository.url, repository.repo_id, sorted(files), left_out)


def check_finished(folder: Path) -> None:
    """Make sure that a folder is that of a finished run.

    Raises:
        HubError: it is not; the message says what it is instead.
    """
    if not folder.is_dir():
        raise HubError(f"{folder}: there is no such folder; name the folder of a run, such as runs/quickstart.")
    has_weights = any(any(folder.glob(pattern)) for pattern in WEIGHTS)
    if has_weights and (folder / "metrics.json").is_file():
        return
    if runs := sorted(path.parent.name for path in folder.glob("*/metrics.json")):
        raise HubError(f"{folder} holds several runs; push one of them, such as {folder / runs[0]}.")
    has_begun = any(folder.glob("checkpoint-*"))
    way_out = "let it end first (--resume goes on)" if has_begun else "name the folder that a run was written to"
    raise HubError(f"{folder} holds no finished run, which has a model and metrics.json; {way_out}.")
