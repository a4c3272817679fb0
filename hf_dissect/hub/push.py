"""Publication of a finished run as a model repository: weights, processor, recipe, figures and card in one commit."""

from dataclasses import dataclass
from pathlib import Path

from hf_dissect.hub.published_files import WEIGHTS, is_published, select_published_files
from hf_dissect.hub.repository import HubError, Repository


@dataclass(frozen=True)
class Push:
    """Result of a publication.

    Attributes:
        url: Address of the repository, for a browser.
        repo_id: Id `USER/REPO`.
        files: Paths in the repository.
        left_out: Settings of the recipe and base of the adapter that belong to one machine and are not published.
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
    """Publish a run folder, and delete from the repository what earlier pushes left and the run no longer has.

    Args:
        run: Folder of a finished run.
        repo_id: Id `USER/REPO`, or a name alone for a repository of the user; created where missing.
        private: Visibility of a new repository; None for the default of its owner.
        revision: Branch to write to, created where missing; None for the main branch.
        token: Token of the user; None for the one that is logged in.
        message: Commit message.

    Raises:
        HubError: The folder holds no finished run or something private, or see `Repository.open` and `upload`.
    """
    folder = Path(run)
    check_finished(folder)
    select_published_files(folder, repo_id)  # refuses what is private before anything is created
    repository = Repository.open(repo_id, private=private, revision=revision, token=token)
    return publish(repository, folder, message=message or "Upload a run of hf_dissect")


def publish(repository: Repository, folder: Path, *, message: str, cards_in: Path | None = None) -> Push:
    """Publish the files of a run folder or of a checkpoint (see `select_published_files`) in place of earlier ones.

    Args:
        repository: Repository to write to.
        folder: Run folder or checkpoint.
        message: Commit message.
        cards_in: Folder of the card and its picture; `folder` by default.

    Raises:
        HubError: A file holds something private, or see `Repository.upload`.
    """
    files, left_out = select_published_files(folder, repository.repo_id, cards_in)
    repository.upload(files, message, outdated=is_published)
    return Push(repository.url, repository.repo_id, sorted(files), left_out)


def check_finished(folder: Path) -> None:
    """Check that a folder holds a finished run.

    Raises:
        HubError: It does not; the message says what it holds instead.
    """
    if not folder.is_dir():
        raise HubError(f"{folder}: there is no such folder; name the folder of a run, such as runs/quickstart.")
    has_weights = any(any(folder.glob(pattern)) for pattern in WEIGHTS)
    if has_weights and (folder / "metrics.json").is_file():
        return
    if runs := sorted(path.parent.name for path in folder.glob("*/metrics.json")):
        raise HubError(f"{folder} holds several runs; push one of them, such as {folder / runs[0]}.")
    has_begun = any(folder.glob("checkpoint-*"))
    way_out = "let it end first (--resume continues it)" if has_begun else "name the folder that a run was written to"
    raise HubError(f"{folder} holds no finished run, which has a model and metrics.json; {way_out}.")
