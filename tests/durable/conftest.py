"""Fixtures of the tests of durable runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Server, nexum_server


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests of a file. No test disturbs another one, because each has its own sessions."""
    with nexum_server(tmp_path_factory.mktemp("nexum")) as running:
        yield running


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the test file's PROGRAM as program.py. The test's own process works in this folder, too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NEXUM_ADDRESS", raising=False)
    (tmp_path / "program.py").write_text(request.module.PROGRAM)
    return tmp_path
