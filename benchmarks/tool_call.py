"""Measure the cost of one durable tool call, and the floor under that cost, in the same run.

    python benchmarks/tool_call.py
    python benchmarks/tool_call.py --json

A call has 300 bytes of arguments, a no-op tool and 1 KB of result. It goes through submit_task with its session file, a
server process and a worker process, on SQLite with synchronous=FULL. The floor is two committed transactions of two
statements (plain sqlite3, one connection) and two gRPC echo round trips between processes (raw bytes). The measurements
take turns, so that a slow moment of the machine affects all of them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import os
import platform
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import grpc

SCRIPT = str(Path(__file__).resolve())
ROOT = Path(SCRIPT).parent.parent
sys.path.insert(0, str(ROOT))

from nexum_engine.client import NexumClient  # noqa: E402 - the project is a folder of scripts, not a package
from nexum_engine.options import count  # noqa: E402
from nexum_engine.worker import Binding, Worker  # noqa: E402
from submit_task import Origin, Session  # noqa: E402
from support.tools import tool  # noqa: E402
from support.tools.web.live import LiveWeb  # noqa: E402
from worker import tool_call_handler  # noqa: E402
from workflow import TOOL_CALL  # noqa: E402

IN_FLIGHT = 32
ARGUMENT = "x" * 280  # 300 bytes as JSON, with the argument's name and the quotes
RESULT = "y" * 1024
ECHO = "/benchmark.Echo/Echo"


@tool(time_limit=60)
async def no_op(argument: str) -> str:
    """Return a text of one kilobyte."""
    return RESULT


# ---- The processes ---------------------------------------------------------------------------------------------------


async def work(address: str) -> None:
    """Run the worker process."""
    async with NexumClient(address) as client:
        handler = tool_call_handler(LiveWeb())
        worker = Worker(client, [Binding(TOOL_CALL, {"tool_call": handler})], concurrency=IN_FLIGHT)
        print("ready", flush=True)
        await worker.run(asyncio.Event())


class _Echo(grpc.GenericRpcHandler):
    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        async def echo(request: bytes, _context: object) -> bytes:
            return request

        return grpc.unary_unary_rpc_method_handler(echo)


async def serve_echo() -> None:
    """Run the echo process."""
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((_Echo(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"ready 127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


@asynccontextmanager
async def process(arguments: list[str], *, cwd: Path) -> AsyncIterator[str]:
    """Run a Python process for the length of a `with`; yield its first line of output."""
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        *arguments,
        cwd=cwd,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert child.stdout is not None
    try:
        line = (await child.stdout.readline()).decode().strip()
        if not line:
            raise SystemExit(f"error: {' '.join(arguments)} did not start; see its error above")
        yield line
    finally:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        await child.wait()


# ---- What is measured ------------------------------------------------------------------------------------------------

Measured = Callable[[], Awaitable[object]]


async def one_by_one(call: Measured, times: int) -> list[float]:
    """Make the calls one after the other; return the seconds of each."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        await call()
        seconds.append(time.perf_counter() - start)
    return seconds


async def per_second(call: Measured, times: int) -> float:
    """Make the calls with 32 in flight; return the number of calls a second."""
    left = iter(range(times))

    async def keep_calling() -> None:
        for _ in left:
            await call()

    start = time.perf_counter()
    await asyncio.gather(*(keep_calling() for _ in range(IN_FLIGHT)))
    return times / (time.perf_counter() - start)


class Plain:
    """The database part of the floor."""

    def __init__(self, folder: Path) -> None:
        self._connection = sqlite3.connect(folder / "floor.db", isolation_level=None)
        for pragma in ("journal_mode = WAL", "synchronous = FULL"):
            self._connection.execute(f"PRAGMA {pragma}")
        self._connection.execute("CREATE TABLE calls (id INTEGER PRIMARY KEY, input TEXT, output TEXT)")
        self._connection.execute("CREATE TABLE events (id INTEGER PRIMARY KEY, call INTEGER, what TEXT)")

    def transactions(self) -> None:
        """Commit two transactions of two statements each."""
        run = self._connection.execute
        run("BEGIN IMMEDIATE")
        call = run("INSERT INTO calls (input) VALUES (?)", (ARGUMENT,)).lastrowid
        run("INSERT INTO events (call, what) VALUES (?, 'started')", (call,))
        run("COMMIT")
        run("BEGIN IMMEDIATE")
        run("UPDATE calls SET output = ? WHERE id = ?", (RESULT, call))
        run("INSERT INTO events (call, what) VALUES (?, 'completed')", (call,))
        run("COMMIT")


class Calls:
    """Durable calls: new ones, each with different arguments, and replays of these from the first on."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._made = 0
        self._replayed = 0

    async def new(self) -> None:
        self._made += 1
        await self._call(self._made, Origin.EXECUTED)

    async def replay(self) -> None:
        self._replayed += 1
        await self._call(self._replayed, Origin.CACHED)

    async def _call(self, number: int, expected: Origin) -> None:
        result = await self._session.call("no_op", {"argument": f"{number:08d}{ARGUMENT[8:]}"})
        if (result.text, result.origin) != (RESULT, expected):
            raise SystemExit(f"error: call {number} was {result.origin.value} instead of {expected.value}")


async def measure(rounds: int, calls: int, folder: Path) -> dict[str, Any]:
    """Run all measurements; return the figures."""
    url = f"sqlite:///{folder / 'nexum.db'}"
    server = ["-m", "nexum_engine", "--listen", "127.0.0.1:0", "--database-url", url]
    os.chdir(folder)
    async with process(server, cwd=folder) as line, process([SCRIPT, "--serve-echo"], cwd=folder) as echo_line:
        address = line.split(" on ")[1].split(",")[0]
        async with (
            process([SCRIPT, "--work", address], cwd=folder),
            grpc.aio.insecure_channel(echo_line.split()[1]) as channel,
        ):
            echo_call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(ECHO)
            session = Session("benchmark", nexum=address)
            durable = Calls(session)
            plain = Plain(folder)

            async def echo() -> None:
                await echo_call(RESULT.encode())

            async def floor() -> None:
                plain.transactions()
                await echo()
                await echo()

            await one_by_one(durable.new, 30)
            await one_by_one(floor, 30)
            call_s, floor_s, replay_s, echo_rate, call_rate = [], [], [], [], []
            for number in range(rounds):
                print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
                call_s += await one_by_one(durable.new, calls)
                floor_s += await one_by_one(floor, calls)
                replay_s += await one_by_one(durable.replay, calls)
                echo_rate.append(await per_second(echo, calls * 10))
                call_rate.append(await per_second(durable.new, calls * 3))
            await session.close()
    return figures(call_s, floor_s, replay_s, echo_rate, call_rate)


def figures(
    call_s: list[float], floor_s: list[float], replay_s: list[float], echo_rate: list[float], call_rate: list[float]
) -> dict[str, Any]:
    """Return the measurements, in milliseconds and calls a second, and their ratios."""

    def spread(seconds: list[float]) -> dict[str, float]:
        cuts = quantiles(seconds, n=100)
        return {f"p{p}": round(cuts[p - 1] * 1000, 3) for p in (50, 95, 99)}

    call, floor, replay = spread(call_s), spread(floor_s), spread(replay_s)
    return {
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        "processors": os.cpu_count(),
        "calls": len(call_s),
        "call_ms": call,
        "floor_ms": floor,
        "replay_ms": replay,
        "calls_per_second": round(median(call_rate)),
        "echoes_per_second": round(median(echo_rate)),
        "call_in_floors": round(call["p50"] / floor["p50"], 2),
        "replay_in_floors": round(replay["p50"] / floor["p50"], 2),
        "throughput_of_echo": round(median(call_rate) / median(echo_rate), 3),
    }


def table(found: dict[str, Any]) -> str:
    """Return the figures as a text table."""
    lines = [f"{'':<34}{'p50':>9}{'p95':>9}{'p99':>9}   milliseconds"]
    for key, name in (
        ("call_ms", "one durable call"),
        ("replay_ms", "one cached replay"),
        ("floor_ms", "floor: 2 commits + 2 echoes"),
    ):
        lines.append(f"{name:<34}" + "".join(f"{found[key][p]:>9.2f}" for p in ("p50", "p95", "p99")))
    lines += [
        "",
        f"a call costs {found['call_in_floors']:.2f} floors, a replay {found['replay_in_floors']:.2f}",
        f"{IN_FLIGHT} in flight: {found['calls_per_second']:,} calls/s, {found['echoes_per_second']:,} echoes/s "
        f"({found['throughput_of_echo']:.1%})",
        f"{found['calls']:,} calls; Python {found['python']}, SQLite {found['sqlite']}, "
        f"{found['processors']} processors",
    ]
    return "\n".join(lines)


def main() -> int:
    """Run the benchmark from the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=count(), default=5, help="number of rounds (default: %(default)s)")
    parser.add_argument("--calls", type=count(), default=200, help="calls one by one in a round (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--work", metavar="HOST:PORT", help=argparse.SUPPRESS)
    parser.add_argument("--serve-echo", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        asyncio.run(work(args.work))
        return 0
    if args.serve_echo:
        asyncio.run(serve_echo())
        return 0
    if args.rounds < 1 or args.calls < 50:
        parser.error("give at least 1 round and 50 calls")
    with tempfile.TemporaryDirectory() as folder:
        # submit_task prints a line for each call, which would hide the table.
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            found = asyncio.run(measure(args.rounds, args.calls, Path(folder)))
        os.chdir(ROOT)
    print(json.dumps(found, indent=2) if args.json else table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
