"""Check that the Hub answers, once and within seconds: its client would wait and retry for minutes."""

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants, get_session
from huggingface_hub.errors import HTTPError
from huggingface_hub.file_download import repo_folder_name

from hf_dissect.hub.address import PREFIX, is_repo_id

CONNECT_S, ANSWER_S = 2.0, 3.0
"""Seconds within which the Hub must accept a connection, and answer."""

_OUTAGES = {"ConnectError", "ConnectTimeout", "ReadTimeout", "WriteTimeout", "PoolTimeout", "ProxyError"}


class HubUnreachable(ConnectionError):
    """Error for a Hub that does not answer; the message says what is needed from it, and what to do."""


@dataclass(frozen=True)
class HubNeed:
    """One thing that is read from the Hub, or written to it.

    Attributes:
        key: Setting or argument that names it.
        name: Value of the setting.
        repo_type: Kind of repository, "model" or "dataset".
        way_out: Another way to get it, after "or".
    """

    key: str
    name: str
    repo_type: str = "model"
    way_out: str = "name a local folder"

    @property
    def is_cached(self) -> bool:
        """True if some revision of the repository is in the cache of this machine."""
        name = self.name.removeprefix(PREFIX).partition("@")[0]
        if not is_repo_id(name):
            return False
        folder = repo_folder_name(repo_id=name, repo_type=self.repo_type)
        return any(Path(constants.HF_HUB_CACHE, folder, "snapshots").glob("*"))


def is_on_hub(name: str | None) -> bool:
    """Return True for a name that `from_pretrained` would look for on the Hub, since no file or folder has it."""
    return bool(name) and is_repo_id(str(name)) and not Path(str(name)).exists()


def check_reachable(needs: Iterable[HubNeed]) -> None:
    """Check that the Hub answers if anything is needed from it; with HF_HUB_OFFLINE, check nothing.

    Args:
        needs: All that is read from the Hub or written to it.

    Raises:
        HubUnreachable: The Hub does not answer.
    """
    needs = list(needs)
    if not needs or constants.HF_HUB_OFFLINE or (reason := _find_outage()) is None:
        return
    wanted = "; ".join(f"{need.key}: {need.name!r}" for need in needs)
    advice = f"check the network, the proxy and HF_ENDPOINT, or {needs[0].way_out}"
    if all(need.is_cached for need in needs):
        advice = "all of it is in the cache: set HF_HUB_OFFLINE=1 to work without the Hub"
    raise HubUnreachable(f"{wanted}: the Hub ({constants.ENDPOINT}) could not be reached ({reason}); {advice}.")


def _find_outage() -> str | None:
    """Return why the Hub does not answer; None if it answers, whatever the answer."""
    outcome: list[str | None] = []
    # The look-up of a name has no time limit of its own, hence the thread.
    asking = threading.Thread(target=lambda: outcome.append(_ask()), daemon=True)
    asking.start()
    asking.join(CONNECT_S + ANSWER_S)
    return outcome[0] if outcome else f"no answer within {CONNECT_S + ANSWER_S:.0f} s"


def _ask() -> str | None:
    limits = (CONNECT_S, ANSWER_S, ANSWER_S, ANSWER_S)  # to connect, to read, to write, to wait for a connection
    try:
        get_session().head(constants.ENDPOINT, timeout=limits, follow_redirects=False)
    except HTTPError as error:
        kind = type(error).__name__
        # Any other error is an answer; what is wrong with it, the client says.
        return f"{kind}: {error}".removesuffix(": ") if kind in _OUTAGES else None
    except ValueError:
        return None
    return None
