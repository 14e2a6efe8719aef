"""The fixtures of a server with TLS and tokens, and of calls that wait at a server."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from certificates import TOKENS
from server_thread import Secured, secured_server

from nexum_engine.records import Execution
from nexum_engine.server.waiters import Waiters


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    with secured_server(tmp_path_factory.mktemp("secured"), TOKENS) as running:
        yield running


@pytest.fixture
def begun_waits(monkeypatch: pytest.MonkeyPatch) -> queue.SimpleQueue[str]:
    """A queue that gets an execution's id when a server in this process begins to wait for the execution's end."""
    begun: queue.SimpleQueue[str] = queue.SimpleQueue()
    watch = Waiters.watch

    @contextmanager
    def watch_and_say(waiters: Waiters, execution_id: str) -> Iterator[asyncio.Future[Execution | None]]:
        with watch(waiters, execution_id) as future:
            begun.put(execution_id)
            yield future

    monkeypatch.setattr(Waiters, "watch", watch_and_say)
    return begun
