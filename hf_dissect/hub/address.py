"""How a repository of the Hub is written where a file or folder could stand: `hub:USER/REPO`, `hub:USER/REPO@v1`."""

from dataclasses import dataclass

PREFIX = "hub:"


def is_hub_address(text: object) -> bool:
    """Whether a text means a repository of the Hub."""
    return isinstance(text, str) and text.startswith(PREFIX)


@dataclass(frozen=True)
class HubAddress:
    """A repository, and the branch, tag or commit that is meant (None: the main branch)."""

    repo_id: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> "HubAddress":
        """Read `hub:USER/REPO` or `hub:USER/REPO@REVISION`.

        Raises:
            ValueError: the text is something else.
        """
        repo_id, at, revision = text.removeprefix(PREFIX).partition("@")
        if not is_repo_id(repo_id) or "/" not in repo_id or (at and not revision):
            raise ValueError(f"{text!r} is no repository of the Hub; write hub:USER/REPO, or hub:USER/REPO@REVISION.")
        return cls(repo_id, revision or None)

    def __str__(self) -> str:
        return f"{PREFIX}{self.repo_id}" + (f"@{self.revision}" if self.revision else "")


def is_repo_id(text: str) -> bool:
    """Whether a text can be the id of a repository, `USER/REPO` or a name alone."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True
