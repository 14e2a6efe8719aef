"""The fixtures of the command `nexum`, a store on a manual clock, a secured server, and calls that wait."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
from certificates import TOKENS
from processes import Command, InProcess
from server_thread import Secured, ServerThread, secured_server

from nexum_engine.__main__ import main
from nexum_engine.clock import ManualClock
from nexum_engine.records import Execution
from nexum_engine.server.waiters import Waiters
from nexum_engine.store import Store, open_store


@pytest.fixture
def address(server: ServerThread) -> str:
    return server.address


@pytest.fixture
def nexum(in_process: InProcess) -> Command:
    """The command `nexum` in the test's folder and process. Don't start a server with it: a server handles signals."""
    return partial(in_process, main)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
async def stores(database_url: str, clock: ManualClock) -> AsyncIterator[list[Store]]:
    opened = [await open_store(database_url, clock)]
    yield opened
    await opened[-1].close()


@pytest.fixture
def store(stores: list[Store]) -> Store:
    return stores[0]


@pytest.fixture
def reopen(stores: list[Store], database_url: str, clock: ManualClock) -> Callable[[], Awaitable[Store]]:
    """Close the store and open it again, as a restarted server does."""

    async def again() -> Store:
        await stores[-1].close()
        stores.append(await open_store(database_url, clock))
        return stores[-1]

    return again


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
    def watch_and_say(
        waiters: Waiters, execution_id: str, seconds: float
    ) -> Iterator[asyncio.Future[Execution | None]]:
        with watch(waiters, execution_id, seconds) as future:
            begun.put(execution_id)
            yield future

    monkeypatch.setattr(Waiters, "watch", watch_and_say)
    return begun
