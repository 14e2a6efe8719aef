"""The floor under a call. Functions that all benchmarks use: run processes, time calls, describe the machine.

The **floor** is two committed transactions of two statements (plain sqlite3, one connection, synchronous=FULL) and two
gRPC echo round trips between processes (raw bytes).
"""

from __future__ import annotations

import asyncio
import compileall
import contextlib
import os
import platform
import re
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc

SCRIPT = str(Path(__file__).resolve())
ROOT = Path(SCRIPT).parent.parent

IN_FLIGHT = 32
ARGUMENT = "x" * 280  # the JSON has 300 bytes: it adds the argument's name and the quotes
RESULT = "y" * 1024
_ECHO = "/benchmark.Echo/Echo"

Call = Callable[[], Awaitable[object]]


def compile_modules(root: Path = ROOT) -> None:
    """Compile the modules of the project in `root` to byte code, as those of installed packages are.

    Otherwise the first processes compile them, or with PYTHONDONTWRITEBYTECODE all processes. That takes longer than
    much of what the benchmarks measure.
    """
    for package in ("nexum_engine", "durable_autogen", "support"):
        compileall.compile_dir(root / package, quiet=1)
    for script in root.glob("*.py"):
        compileall.compile_file(script, quiet=1)


class Plain:
    """The database part of the floor: two commits of two statements each."""

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(path, isolation_level=None)
        for pragma in ("journal_mode = WAL", "synchronous = FULL"):
            self._connection.execute(f"PRAGMA {pragma}")
        self._connection.execute("CREATE TABLE calls (id INTEGER PRIMARY KEY, input TEXT, output TEXT)")
        self._connection.execute("CREATE TABLE events (id INTEGER PRIMARY KEY, call INTEGER, what TEXT)")

    def start(self) -> int:
        """Commit the start of a call; return its number."""
        run = self._connection.execute
        run("BEGIN IMMEDIATE")
        call = run("INSERT INTO calls (input) VALUES (?)", (ARGUMENT,)).lastrowid
        run("INSERT INTO events (call, what) VALUES (?, 'started')", (call,))
        run("COMMIT")
        assert call is not None
        return call

    def complete(self, call: int) -> None:
        """Commit the result of a call."""
        run = self._connection.execute
        run("BEGIN IMMEDIATE")
        run("UPDATE calls SET output = ? WHERE id = ?", (RESULT, call))
        run("INSERT INTO events (call, what) VALUES (?, 'completed')", (call,))
        run("COMMIT")


class Floor:
    """The floor and its parts. Each method makes one call."""

    def __init__(self, folder: Path, channel: grpc.aio.Channel) -> None:
        self._plain = Plain(folder / "floor.db")
        self._echo: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(_ECHO)

    async def floor(self) -> None:
        """Make two commits and two echoes."""
        await self.commits()
        await self.echo()
        await self.echo()

    async def commits(self) -> None:
        """Make two commits."""
        self._plain.complete(self._plain.start())

    async def echo(self) -> None:
        """Make one echo."""
        await self._echo(RESULT.encode())


@asynccontextmanager
async def open_floor(folder: Path) -> AsyncIterator[Floor]:
    """Run the echo server in a process for the length of a `with`; yield the Floor, which measures with it."""
    async with process([SCRIPT], cwd=folder) as child, grpc.aio.insecure_channel(child.address) as channel:
        yield Floor(folder, channel)


class _Echo(grpc.GenericRpcHandler):
    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        async def echo(request: bytes, _context: object) -> bytes:
            return request

        return grpc.unary_unary_rpc_method_handler(echo)


async def serve(handler: grpc.GenericRpcHandler) -> None:
    """Run a gRPC server on a free port, and print its address."""
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"ready 127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


# ---- Child processes -------------------------------------------------------------------------------------------------


class Child:
    """A running Python process."""

    def __init__(self, process: asyncio.subprocess.Process, line: str) -> None:
        self._process = process
        self._line = line

    @property
    def address(self) -> str:
        """The address in the process's first line of output."""
        found = re.search(r"127\.0\.0\.1:\d+", self._line)
        assert found is not None, self._line
        return found[0]

    @property
    def pid(self) -> int:
        """The number of the process."""
        return self._process.pid

    @property
    def cpu_seconds(self) -> float:
        """The CPU time of the process so far; 0 on systems without /proc."""
        try:
            fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # utime and stime

    async def ask(self, question: str) -> str:
        """Write a line to the process; return its next line of output."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{question}\n".encode())
        line = (await self._process.stdout.readline()).decode()
        if not line:
            raise SystemExit("error: a process of the benchmark ended; see its error above")
        return line


@asynccontextmanager
async def process(arguments: list[str], *, cwd: Path) -> AsyncIterator[Child]:
    """Run a Python process for the length of a `with`. Yield it after its first line of output."""
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        *arguments,
        cwd=cwd,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert child.stdout is not None
    try:
        line = (await child.stdout.readline()).decode().strip()
        if not line:
            raise SystemExit(f"error: {' '.join(arguments)} did not start; see its error above")
        yield Child(child, line)
    finally:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        await child.wait()


@asynccontextmanager
async def nexum_server(folder: Path, database_url: str = "") -> AsyncIterator[Child]:
    """Run a Nexum server for the length of a `with`.

    By default, its database has a folder of its own in `folder`, as it has if nobody names a database.
    """
    url = database_url or f"sqlite:///{folder / 'server' / 'nexum.db'}"
    command = ["-m", "nexum_engine", "--listen", "127.0.0.1:0", "--database-url", url]
    async with process(command, cwd=folder) as child:
        yield child


# ---- Measuring -------------------------------------------------------------------------------------------------------


async def one_by_one(call: Call, times: int) -> list[float]:
    """Make the calls one after the other; return the seconds of each."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        await call()
        seconds.append(time.perf_counter() - start)
    return seconds


async def per_second(call: Call, times: int, in_flight: int = IN_FLIGHT) -> float:
    """Make the calls, `in_flight` at a time; return the number of calls per second."""
    left = iter(range(times))

    async def keep_calling() -> None:
        for _ in left:
            await call()

    start = time.perf_counter()
    await asyncio.gather(*(keep_calling() for _ in range(in_flight)))
    return times / (time.perf_counter() - start)


def machine() -> dict[str, Any]:
    """Return the description of this machine for a benchmark's figures."""
    return {
        "python": platform.python_version(),
        "processors": os.cpu_count(),
        "load": [round(one, 1) for one in os.getloadavg()] if hasattr(os, "getloadavg") else [],
    }


def machine_text(found: dict[str, Any]) -> str:
    """Return the description of the machine as text."""
    load = f", load {found['load'][0]:.1f} at the end" if found["load"] else ""
    return f"Python {found['python']}, {found['processors']} processors{load}"


if __name__ == "__main__":
    asyncio.run(serve(_Echo()))
