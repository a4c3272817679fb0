"""Repositories of the Hub to write to, with errors that say what to do and retries that lose nothing."""

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoUrl
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hf_dissect.hub.reachability import HubNeed, check_reachable
from hf_dissect.version import __version__

logger = logging.getLogger(__name__)

PAUSES = (1, 4, 15)
"""Seconds to wait before each retry."""

_Result = TypeVar("_Result")
_WORDS = {"model": "model", "dataset": "data set"}
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN, with a token that may write (huggingface.co/settings/tokens)"


class HubError(OSError):
    """Error for a Hub that cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class Repository:
    """Repository of the Hub that can be written to.

    Attributes:
        repo_id: Id `USER/REPO`.
        repo_type: Kind of repository, "model" or "dataset".
        url: Address for a browser.
        revision: Branch to write to; None for the main branch.
        api: Client, with the token to use.
    """

    repo_id: str
    repo_type: str
    url: str
    revision: str | None
    api: HfApi

    @classmethod
    def open(
        cls,
        repo_id: str,
        repo_type: str = "model",
        *,
        private: bool | None = None,
        revision: str | None = None,
        token: str | None = None,
    ) -> "Repository":
        """Create the repository and the branch where they are missing.

        Args:
            repo_id: Id `USER/REPO`, or a name alone for a repository of the user.
            repo_type: Kind of repository, "model" or "dataset".
            private: Visibility of a new repository; None for the default of its owner.
            revision: Branch to write to.
            token: Token of the user; None for the one that is logged in.

        Raises:
            HubUnreachable: The Hub does not answer.
            HubError: Nobody is logged in, the token may not write there, or `private` was asked for and the repository
                is public.
        """
        api = open_client(token)
        check_reachable([HubNeed("repository", repo_id, repo_type, "repeat the same command later")])
        with explain_hub_errors(repo_id, repo_type):
            retry(api.whoami)
            url: RepoUrl = retry(lambda: api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True))
            if private and not retry(lambda: api.repo_info(url.repo_id, repo_type=repo_type)).private:
                raise HubError(
                    f"{url.repo_id} exists and is public; make it private in its settings first, or take another name."
                )
            if revision is not None:
                retry(lambda: api.create_branch(url.repo_id, repo_type=repo_type, branch=revision, exist_ok=True))
        return cls(url.repo_id, repo_type, str(url), revision, api)

    def upload(self, files: Mapping[str, Path | bytes], message: str, *, outdated: Callable[[str], bool]) -> list[str]:
        """Publish files in one commit: all of them or, if it fails, none.

        Files that have not changed, or that an earlier attempt has sent already, are not sent again. A repository
        that needs no change gets no commit.

        Args:
            files: Path in the repository -> file, or its content.
            message: Commit message.
            outdated: Function that returns True for a path of the repository to delete where `files` lacks it.

        Returns:
            Deleted paths of the repository.

        Raises:
            HubError: The Hub refused the files, or could not be reached.
        """
        with explain_hub_errors(self.repo_id, self.repo_type):
            existing = retry(
                lambda: self.api.list_repo_files(self.repo_id, repo_type=self.repo_type, revision=self.revision)
            )
            deleted = sorted(path for path in existing if path not in files and outdated(path))
            retry(
                lambda: self.api.create_commit(
                    self.repo_id,
                    # New ones for each attempt: an operation that was committed cannot be used again.
                    operations=[*_additions(files), *map(CommitOperationDelete, deleted)],
                    commit_message=message,
                    repo_type=self.repo_type,
                    revision=self.revision,
                )
            )
        return deleted


def open_client(token: str | None = None) -> HfApi:
    """Open a client of the Hub, for the endpoint that the environment names."""
    return HfApi(token=token, library_name="hf_dissect", library_version=__version__)


def retry(action: Callable[[], _Result]) -> _Result:
    """Call `action`, and call it again after each of `PAUSES` while the connection or the Hub fails."""
    for pause in PAUSES:
        try:
            return action()
        except Exception as error:
            if not _is_temporary(error):
                raise
            logger.warning("The Hub could not be reached (%s); trying again in %s s.", _in_short(error), pause)
            time.sleep(pause)
    return action()


@contextmanager
def explain_hub_errors(repo_id: str, repo_type: str = "model") -> Iterator[None]:
    """Raise errors of the client as a `HubError` that says what to do."""
    try:
        yield
    except HubError:
        raise
    except Exception as error:
        message = _advice(_cause(error), repo_id, _WORDS[repo_type])
        if message is None:
            raise
        raise HubError(message) from error


def _additions(files: Mapping[str, Path | bytes]) -> Iterable[CommitOperationAdd]:
    return [CommitOperationAdd(path, content) for path, content in files.items()]


def _cause(error: BaseException) -> BaseException:
    """Return the cause of an error: the client wraps what went wrong when it sent a file."""
    return error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error


def _is_temporary(error: Exception) -> bool:
    """Return True for a failure that another attempt may get over."""
    cause = _cause(error)
    if isinstance(cause, HfHubHTTPError):
        return _status(cause) >= 500 or _status(cause) == 429
    # The client reads an answer as JSON before it looks at its status.
    return isinstance(cause, HTTPError | json.JSONDecodeError) and not isinstance(cause, OfflineModeIsEnabled)


def _status(error: HfHubHTTPError) -> int:
    return getattr(error.response, "status_code", 0)


def _advice(error: BaseException, repo_id: str, what: str) -> str | None:
    """Return a message for the user; None for a fault of the program."""
    if isinstance(error, OfflineModeIsEnabled):
        return f"{repo_id}: the Hub is switched off by HF_HUB_OFFLINE; unset it."
    if isinstance(error, LocalTokenNotFoundError):
        return f"{repo_id}: nobody is logged in at the Hub; {_LOG_IN}."
    if isinstance(error, LocalEntryNotFoundError):
        return f"{repo_id}: the Hub could not be reached, and the cache has no copy; check the network, and try again."
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} has no such branch, tag or commit; check what stands behind the @, or --revision."
    if isinstance(error, EntryNotFoundError):
        return f"{repo_id} has no such file: {_in_short(error)}"
    if isinstance(error, RepositoryNotFoundError):
        return f"{repo_id}: the Hub has no such {what}, or it is private; check the name, or {_LOG_IN}."
    if isinstance(error, HfHubHTTPError) and _status(error) == 401:
        return f"{repo_id}: the Hub does not know the token; {_LOG_IN}."
    if isinstance(error, HfHubHTTPError) and _status(error) == 403:
        return (
            f"{repo_id}: the token may not write there; name a repository of your own or of your organisation, "
            f"and {_LOG_IN}."
        )
    if isinstance(error, HfHubHTTPError | HTTPError | json.JSONDecodeError):
        return (
            f"{repo_id}: the Hub could not be used ({_in_short(error)}). What arrived is kept: run the same command "
            "again, and only the rest is sent."
        )
    return None


def _in_short(error: BaseException) -> str:
    cause = _cause(error)
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0]}" if lines else type(cause).__name__
