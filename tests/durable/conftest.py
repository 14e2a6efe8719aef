"""Fixtures of the tests of durable runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from harness import Server, nexum_server


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for the whole file: each test has sessions of its own."""
    with nexum_server(tmp_path_factory.mktemp("nexum")) as running:
        yield running
