"""Tests of reports look at what is drawn."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def everything_is_drawn(drawn: None) -> None:
    """Draw all figures."""
