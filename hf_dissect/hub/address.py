"""Addresses of Hub repositories where a file or folder is expected: `hub:USER/REPO`, `hub:USER/REPO@v1`."""

from dataclasses import dataclass

PREFIX = "hub:"


def is_hub_address(text: object) -> bool:
    """Return True for text that names a repository of the Hub."""
    return isinstance(text, str) and text.startswith(PREFIX)


@dataclass(frozen=True)
class HubAddress:
    """Repository of the Hub and one of its revisions.

    Attributes:
        repo_id: Id `USER/REPO`.
        revision: Branch, tag or commit; None for the main branch.
    """

    repo_id: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> "HubAddress":
        """Read `hub:USER/REPO` or `hub:USER/REPO@REVISION`.

        Raises:
            ValueError: The text is something else.
        """
        repo_id, at, revision = text.removeprefix(PREFIX).partition("@")
        if not is_repo_id(repo_id) or "/" not in repo_id or (at and not revision):
            raise ValueError(
                f"{text!r} is not a repository of the Hub; write hub:USER/REPO, or hub:USER/REPO@REVISION."
            )
        return cls(repo_id, revision or None)

    def __str__(self) -> str:
        return f"{PREFIX}{self.repo_id}" + (f"@{self.revision}" if self.revision else "")


def is_repo_id(text: str) -> bool:
    """Return True for text that can be the id of a repository, `USER/REPO` or a name alone."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True
