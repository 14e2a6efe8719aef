"""Fixtures that every test file may use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock
from harness import Server, nexum_server


@pytest.fixture
def default_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The port of embedded servers, for one test at a time, also when several processes run tests (pytest -n)."""
    shared = tmp_path_factory.getbasetemp().parent
    with FileLock(shared / "default-port.lock"):
        yield


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A real server process on a database of its own."""
    with nexum_server(tmp_path) as running:
        yield running
