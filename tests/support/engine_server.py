"""A Nexum server in the test's process, so that a test can inject faults into its store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import harness

from nexum_engine.clock import SystemClock
from nexum_engine.errors import StoreUnavailable
from nexum_engine.server.bounds import Reading, add_servicer
from nexum_engine.server.polls import Polls
from nexum_engine.server.servicer import NexumServicer
from nexum_engine.store import Store, open_store
from nexum_engine.store.submitted import Submitted

Transition = Callable[..., Any]
Run = Callable[[], Awaitable[Any]]
"""A function that runs the intercepted transition."""


def intercept(store: Store, transition: Transition, instead: Callable[[Run], Awaitable[Any]]) -> None:
    """Call `instead` for every run of the transition on the store. `instead` may run the transition."""
    run_any = store.run
    settling: set[asyncio.Task[None]] = set()

    def run(submitted: Transition, *args: Any, **options: Any) -> Submitted[Any]:
        run_it = partial(run_any, submitted, *args, **options)
        outcome = instead(run_it) if submitted is transition else run_it()
        if isinstance(outcome, Submitted):
            return outcome
        given: Submitted[Any] = Submitted(asyncio.get_running_loop())
        task = asyncio.ensure_future(_settle(given, outcome))
        settling.add(task)
        task.add_done_callback(settling.discard)
        return given

    store.run = run  # type: ignore[method-assign,assignment]


async def _settle(submitted: Submitted[Any], outcome: Awaitable[Any]) -> None:
    try:
        submitted.settle(await outcome)
    except Exception as error:  # noqa: BLE001 - the caller of the intercepted transition gets this error
        submitted.settle(error)


class EngineServer:
    """A running server: its address, its store and the injected faults."""

    def __init__(self, store: Store, polls: Polls, address: str) -> None:
        self.store = store
        self.polls = polls
        self.address = address
        self.calls: dict[Transition, int] = {}
        """The number of runs of each watched transition."""

    def watch(self, transition: Transition, *faults: Callable[[], Awaitable[Any]]) -> None:
        """Count the runs of a transition. The first runs call `faults` instead, one fault per run, in order."""
        self.calls[transition] = 0

        def counted(run: Run) -> Awaitable[Any]:
            self.calls[transition] += 1
            number = self.calls[transition]
            return faults[number - 1]() if number <= len(faults) else run()

        intercept(self.store, transition, counted)


async def raises() -> None:
    """Raise an error as a bug in the server would."""
    raise RuntimeError("a bug")


async def is_full() -> None:
    """Raise the error of a database that can't confirm a transaction."""
    raise StoreUnavailable("the database could not confirm the transaction: retry")


async def hangs() -> None:
    """Never return."""
    await asyncio.Event().wait()


@asynccontextmanager
async def engine_server(folder: Path, *, lease: float = 30.0, port: int = 0) -> AsyncIterator[EngineServer]:
    """Run a server on the folder's database; yield it when it is ready for calls. `lease` is in seconds."""
    clock = SystemClock()
    store = await open_store(harness.url_of(folder), clock)
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)], interceptors=[Reading()])
    servicer = NexumServicer(store, clock, round(lease * 1000))
    add_servicer(servicer, server)
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    await servicer.start()
    await server.start()
    try:
        yield EngineServer(store, servicer.polls, f"127.0.0.1:{port}")
    finally:
        await servicer.stop()
        await server.stop(0)
        await store.close()
