"""Programs that open the database themselves, because no server runs, and record events: `hosting_program.py MODE ...`.

Each mode is a function. It prints `RECORDED n` when the server has acknowledged event n.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from nexum_engine.client import NexumClient
from nexum_engine.embedded import EmbeddedNexum
from nexum_engine.errors import NexumError
from nexum_engine.owner import Owner
from nexum_engine.workflow import workflow

EVENT = workflow("event").effect("a").build()


@asynccontextmanager
async def owner() -> AsyncIterator[Owner]:
    async with EmbeddedNexum(None, owners=True) as nexum, NexumClient(nexum.address) as client, Owner(client) as owner:
        yield owner


def say(line: str) -> None:
    """Print a line with one write, so that lines of several threads don't mix."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


async def record(owner: Owner, key: str) -> None:
    await owner.record(EVENT, {"key": key}, {"size": "y" * 1000}, idempotency_key=key)
    say(f"RECORDED {key}")


def is_open(gate: str) -> bool:
    """Return whether the file `gate` exists. An empty `gate` counts as open."""
    return not gate or os.path.exists(gate)


async def events(name: str, count: int, gate: str = "") -> None:
    """Record at least `count` events, and continue until the file `gate` exists."""
    async with owner() as found:
        number = 0
        while number < count or not is_open(gate):
            number += 1
            await record(found, f"{name}-{number}")
            await asyncio.sleep(0.001)
    say("ENDED")


def several(name: str, count: str, gate: str = "") -> None:
    asyncio.run(events(name, int(count), gate))


def on_uvloop(name: str, count: str) -> None:
    import uvloop

    loop = uvloop.new_event_loop()
    loop.run_until_complete(events(name, int(count)))
    loop.close()


def threads(name: str) -> None:
    """Record events at the same time in three threads, each with its own event loop. The first loop has two tasks."""

    async def two() -> None:
        async with EmbeddedNexum(None):  # keeps the server running until all threads have ended
            others = [threading.Thread(target=several, args=(f"{name}-{number}", "20")) for number in (1, 2)]
            for other in others:
                other.start()
            await asyncio.gather(events(f"{name}-a", 20), events(f"{name}-b", 20))
            for other in others:
                await asyncio.to_thread(other.join)

    asyncio.run(two())


def blocked(name: str, gate: str) -> None:
    """Block the program's event loop until the file `gate` exists."""

    async def main() -> None:
        async with owner() as found:
            await record(found, f"{name}-1")
            while not is_open(gate):
                time.sleep(0.01)  # noqa: ASYNC251 - the loop must be blocked
            await record(found, f"{name}-2")

    asyncio.run(main())


async def own(key: str) -> None:
    async with owner() as found:
        await record(found, key)


def forks(name: str) -> None:
    """Fork while a thread has the database open. The child records, and ends as a script ends."""
    opened, forked = threading.Event(), threading.Event()

    async def parent() -> None:
        async with owner() as found:
            await record(found, f"{name}-parent-1")
            opened.set()
            await asyncio.to_thread(forked.wait)
            await record(found, f"{name}-parent-2")

    thread = threading.Thread(target=lambda: asyncio.run(parent()))
    thread.start()
    opened.wait()
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
        forked.set()
        thread.join()
    else:
        asyncio.run(own(f"{name}-child"))


def orphan(name: str) -> None:
    """Fork a child. A test kills this process, and the child lives on."""

    async def main() -> None:
        async with owner() as found:
            await record(found, f"{name}-1")
            child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
            child.start()
            print("ORPHAN", child.pid, flush=True)
            await asyncio.sleep(60)

    asyncio.run(main())


def forked_without_a_server(name: str) -> None:
    """Record in a forked child while no server runs."""

    def child() -> None:
        try:
            asyncio.run(own(name))
        except NexumError as error:
            print("ERROR", error, flush=True)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()


def main_ends(name: str) -> None:
    """Record in a thread that continues after the main thread's end."""

    begun = threading.Event()

    async def main() -> None:
        async with owner() as found:
            await record(found, f"{name}-1")
            begun.set()
            for number in range(2, 10):
                await asyncio.sleep(0.05)
                await record(found, f"{name}-{number}")

    threading.Thread(target=lambda: asyncio.run(main())).start()
    begun.wait()


def ends(how: str) -> None:
    """Record an event, and end the program in the way `how`, while the program's owner is still open."""

    async def main() -> None:
        async with owner() as found:
            await record(found, how)
            if how == "exit":
                sys.exit(7)
            if how == "exception":
                raise SystemError("on purpose")
            if how == "os._exit":
                os._exit(7)
            await asyncio.sleep(60)

    async def leave_open() -> object:
        nexum = EmbeddedNexum(None, owners=True)
        await nexum.__aenter__()
        client = NexumClient(nexum.address)
        found = await Owner(client).__aenter__()
        await record(found, how)
        return nexum, client, found, asyncio.ensure_future(client.ping())

    if how == "unclosed":
        loop = asyncio.new_event_loop()
        loop.set_exception_handler(lambda *_: None)  # don't report the tasks that are still pending
        kept = loop.run_until_complete(leave_open())
        loop.close()
        del kept
    else:
        asyncio.run(main())


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    globals()[sys.argv[1]](*sys.argv[2:])
