"""Servers on one PostgreSQL tell each other of changes. If they are not told, they find the changes themselves."""

from __future__ import annotations

import asyncio
import queue
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from harness import nexum_server
from nexum_wire import DEADLINE, cancelled, connected, poll, record, register, start, until_polled
from server_thread import server_thread

from nexum_engine.clock import SystemClock
from nexum_engine.store import Store, executions, open_store, tasks

postgresql = pytest.importorskip("nexum_engine.store.postgresql", reason="psycopg isn't installed")

SOON = 10.0  # seconds; a server looks for missed changes each second, but a call waits for up to LONG_MS
LONG_MS = 25_000


@pytest.fixture
def lost(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A list to which this process adds its news, instead of sending it to other servers."""
    news: list[Any] = []
    monkeypatch.setattr(postgresql, "send", lambda *args: news.append(args[-1]))
    return news


@pytest.fixture
async def silent(postgres_url: str, lost: list[Any]) -> AsyncIterator[Store]:
    """A store that acts as another server. Its messages to the other servers are lost."""
    store = await open_store(postgres_url, SystemClock())
    yield store
    await store.close()


async def test_poll_finds_a_task_of_which_it_was_not_told(
    tmp_path: Path, postgres_url: str, silent: Store, lost: list[Any]
) -> None:
    with nexum_server(tmp_path, database_url=postgres_url) as server, connected(server.address) as stub:
        register(stub, {"a": []})
        probe = cancelled(stub)
        waiting = asyncio.create_task(asyncio.to_thread(poll, stub, wait_ms=LONG_MS))
        await asyncio.to_thread(until_polled, stub, probe)
        begun = time.monotonic()
        started = await silent.run(executions.start_execution, "w", "v1", "{}", "")
        assert (await waiting).execution_id == started.execution_id
        assert time.monotonic() - begun < SOON
        assert [one.ready for one in lost] == [("v1",)]


async def test_wait_finds_an_end_of_which_it_was_not_told(
    tmp_path: Path, postgres_url: str, silent: Store, lost: list[Any], begun_waits: queue.SimpleQueue[str]
) -> None:
    with server_thread(tmp_path, database_url=postgres_url) as server, connected(server.address) as stub:
        register(stub, {"a": []})
        execution_id = start(stub)
        waiting = asyncio.create_task(asyncio.to_thread(record, stub, execution_id, wait_ms=LONG_MS))
        assert await asyncio.to_thread(begun_waits.get, timeout=DEADLINE) == execution_id
        task = (await silent.run(tasks.claim, "other", ("v1",), 2**40, 30_000, True)).task
        assert task is not None
        begun = time.monotonic()
        await silent.run(tasks.complete_task, task.task_id, "1")
        assert (await waiting).status == "COMPLETED"
        assert time.monotonic() - begun < SOON
        assert [one.ended for one in lost if one.ended] == [(execution_id,)]
