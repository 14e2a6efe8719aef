"""Fixtures that every test file may use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Server, nexum_server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A real server process on a database of its own."""
    with nexum_server(tmp_path) as running:
        yield running
