"""Fixtures that every test file may use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Server, nexum_server

USES_DEFAULT_PORT = {"test_cli", "test_crash_demo", "test_demo", "test_demo_children"}


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in a hook of this name, too
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of an embedded server share one port, so with several processes (pytest -n) one of them runs them all."""
    for item in items:
        if item.path.stem in USES_DEFAULT_PORT:
            item.add_marker(pytest.mark.xdist_group("default port"))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A real server process on a database of its own."""
    with nexum_server(tmp_path) as running:
        yield running
