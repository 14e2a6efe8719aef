"""Fixtures that every test file may use."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Server, nexum_server

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts what runs in the background so; the processes under test would never hear of Ctrl+C.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A real server process on a database of its own."""
    with nexum_server(tmp_path) as running:
        yield running
