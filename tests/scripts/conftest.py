"""The fixture of a server for the tests of scripts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import harness
import pytest
from server_thread import ServerThread, server_thread


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerThread]:
    """A server with a database of its own. It is no process, so a test starts it quickly, but can't kill it."""
    with server_thread(tmp_path, database_url=harness.url_of(tmp_path)) as running:
        yield running
