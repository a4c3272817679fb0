"""A real browser for the pages that are opened from the file system."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install .[dev]")
expect = playwright.expect

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"


@contextmanager
def chromium() -> Iterator:
    """A headless Chromium; skips the test where there is none."""
    if not os.access(CHROMIUM, os.X_OK):
        pytest.skip("Chromium is not installed (on Debian: apt-get install chromium)")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])  # root has no sandbox
        yield browser
        browser.close()


class Visit:
    """A page that was opened from a file or an address, with what it asked for and what went wrong in it."""

    def __init__(self, context, path: Path | str):
        self.requests: list[str] = []
        self.problems: list[str] = []
        self.page = context.new_page()
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("requestfailed", lambda request: self.problems.append(f"failed: {request.url}"))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", self._heed)
        self.page.on("dialog", self._refuse)
        self.origins = ("file://",) if isinstance(path, Path) else (path,)
        self.page.goto(path.resolve().as_uri() if isinstance(path, Path) else path)

    def _heed(self, message) -> None:
        if message.type in ("error", "warning"):
            self.problems.append(message.text)

    def _refuse(self, dialog) -> None:
        self.problems.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def check(self) -> None:
        """Nothing went wrong, and nothing was asked for but files, or what is at the address."""
        assert self.problems == []
        assert self.requests and all(url.startswith((*self.origins, "data:", "blob:")) for url in self.requests)
