"""Measure this project beside its peers: the same tool call, with each peer set up as its documentation says.

    python benchmarks/compare.py
    python benchmarks/compare.py --only nexum-worker --only procrastinate --json found.json --chart found.svg
    pip install -r benchmarks/requirements.txt     # the peers; the benchmark names and skips missing ones

A call has 300 bytes of arguments, a tool that does nothing and 1 KB of result. The first table has calls that are
executed in the caller's process, the second one has calls that another process executes. In each round, each peer
starts its own processes on its own database, is measured, and ends. The unit of all ratios is a commit of plain SQLite
(synchronous=FULL): ten commits are measured after every ten calls. strace shows what each peer has written to disk when
the caller has its result.

The columns:

- `calls`: how many calls are made in the time of a commit (ratios) or in a second, while 32 runs are in flight.
- `replay`: the caller is killed after 20 recorded calls, and a new caller connects. The time is from the connection
  until the run continues (first table), or until the new caller has all 20 results (second table).
- `recovery`: a worker is killed while it executes a call. The time is from the kill until the caller has the result,
  which another worker produces.
- `start`: from the start of all processes to the first result.
- `MB`: memory of all processes; shared pages are counted once.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import sqlite3
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS.parent)]

from floor import compile_modules  # noqa: E402
from peers import ALL  # noqa: E402
from peers.base import (  # noqa: E402
    ARGUMENT_BYTES,
    FOLDER,
    IN_FLIGHT,
    RECORDED,
    RESULT_BYTES,
    STOPPED,
    Call,
    Group,
    Peer,
    again_file,
    stop_file,
)
from peers.figures import Durable, Row, chart, notes, tables  # noqa: E402
from peers.nexum_peer import PublishedNexum  # noqa: E402
from peers.processes import Child, PeerFailed, Processes, Trace, kill_pid  # noqa: E402

from nexum_engine.options import count  # noqa: E402 - the project is a folder of scripts, not a package

BLOCK = 10  # calls in a row; after each block, as many plain SQLite commits are measured
WARM_UP = 20  # calls before the measured ones
TRACED = 20  # calls whose fsyncs are counted
LONG_RECOVERY = 20.0  # seconds; a recovery that takes longer is measured only once


class PlainCommits:
    """Commits of plain SQLite with synchronous=FULL. Their time is the unit in which the output gives other times."""

    def __init__(self, folder: Path) -> None:
        self._connection = sqlite3.connect(folder / "commits.db", isolation_level=None)
        for pragma in ("journal_mode = WAL", "synchronous = FULL"):
            self._connection.execute(f"PRAGMA {pragma}")
        self._connection.execute("CREATE TABLE calls (id INTEGER PRIMARY KEY, input TEXT, output TEXT)")

    def make(self, commits: int) -> list[float]:
        """Commit transactions of one statement; return the seconds of each."""
        seconds = []
        for _ in range(commits):
            began = time.perf_counter()
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.execute(
                "INSERT INTO calls (input, output) VALUES (?, ?)", ("x" * ARGUMENT_BYTES, "y" * RESULT_BYTES)
            )
            self._connection.execute("COMMIT")
            seconds.append(time.perf_counter() - began)
        return seconds

    def close(self) -> None:
        """Close the database: on Windows, an open file can't be deleted."""
        self._connection.close()


async def run(caller: Child, name: str, calls: int) -> list[Call]:
    """Make a run; return its calls."""
    return [Call(*times) for times in await caller.ask("run", name=name, calls=calls)]


class Comparison:
    """The peers, with their measurements."""

    def __init__(self, peers: Sequence[Peer], folder: Path, plain: PlainCommits, calls: int, together: int) -> None:
        self.rows = {peer: Row(peer) for peer in peers}
        self._folder = folder
        self._calls = calls
        self._together = together
        self._plain = plain
        self._ports: dict[str, dict[str, int]] = {peer.name: {} for peer in peers}

    async def measure(self, rounds: int, *, set_up: bool) -> None:
        """Let the peers take turns. After a failure, a peer gets no more turns."""
        for number in range(0 if set_up else 1, rounds + 1):
            for peer, row in self.rows.items():
                if row.failure is not None:
                    continue
                tell(f"{f'round {number} of {rounds}' if number else 'setting up'}: {peer.name}")
                try:
                    await self._turn(peer, row, number, trace=row.durable is None)
                except PeerFailed as error:
                    row.failure = str(error)
                    tell(f"{peer.name} failed: {error}")

    async def _turn(self, peer: Peer, row: Row, number: int, *, trace: bool) -> None:
        """Start a peer, measure it, and end it. In turn 0, only create its database and look at its fsyncs."""
        folder = self._folder / peer.name
        folder.mkdir(exist_ok=True)
        os.environ[FOLDER] = str(folder)
        async with Processes(peer, folder, self._ports[peer.name]) as processes:
            began = time.time()
            await processes.serve()
            worker = await processes.start_worker() if peer.group is Group.WORKER else None
            caller = await processes.start_caller()
            if worker is not None:
                await worker.answer()
            await caller.answer()
            first = await run(caller, f"first-{number}", 1)
            if number:
                row.starts.append(first[-1].ended - began)
            await run(caller, f"warm-{number}", WARM_UP)
            if trace and peer.is_whole:
                row.durable = await self._trace(processes, caller)
            if not number:
                return
            for block in range(self._calls // BLOCK):
                made = await run(caller, f"one-{number}-{block}", BLOCK)
                row.add([call.ended - call.began for call in made], self._plain.make(BLOCK))
            seconds = await caller.ask("together", name=f"together-{number}", calls=self._together)
            row.rates.append(self._together / seconds)
            if peer.is_whole and (memory := processes.memory()) is not None:
                row.memory.append(memory)
            if peer.replays:
                measure = self._replay_run if peer.group is Group.CALLER else self._replay_calls
                caller = await measure(processes, caller, row, number)
            if peer.group is Group.WORKER and max(row.recoveries, default=0.0) < LONG_RECOVERY:
                row.recoveries.append(await self._recovery(peer, processes, caller, number))

    async def _trace(self, processes: Processes, caller: Child) -> Durable | None:
        tracing = Trace(processes.pids(), processes.folder)
        async with tracing as attached:
            if attached is None:
                return None
            calls = await run(caller, "traced", TRACED)
        return Durable.of(calls, tracing.syncs())

    async def _replay_run(self, processes: Processes, caller: Child, row: Row, number: int) -> Child:
        """Kill the caller in the last call of a run; measure the time until a new caller continues the run."""
        name = f"{STOPPED}replay-{number}"
        caller.send("run", name=name, calls=RECORDED + 1)
        await processes.wait_for(stop_file(name))
        await caller.kill()
        caller = await processes.start_caller()
        began = (await caller.answer())["began"]
        calls = await run(caller, name, RECORDED + 1)
        row.replays.append(float(await processes.wait_for(again_file(name))) - began)
        row.replayed.append(sum(call.executed < began for call in calls))
        return caller

    async def _replay_calls(self, processes: Processes, caller: Child, row: Row, number: int) -> Child:
        """Make the calls of a run, kill the caller, and let a new caller make the calls of this run again."""
        name = f"recorded-{number}"
        await run(caller, name, RECORDED)
        await caller.kill()
        caller = await processes.start_caller()
        began = (await caller.answer())["began"]
        calls = await run(caller, name, RECORDED)
        row.replays.append(calls[-1].ended - began)
        row.replayed.append(sum(call.executed < began for call in calls))
        return caller

    async def _recovery(self, peer: Peer, processes: Processes, caller: Child, number: int) -> float:
        """Kill a worker while it executes a call; return the seconds until the caller has the call's result."""
        if not peer.restarts_worker:
            await (await processes.start_worker()).answer()
        name = f"{STOPPED}worker-{number}"
        caller.send("run", name=name, calls=1)
        pid = int(await processes.wait_for(stop_file(name)))
        killed = time.time()
        kill_pid(pid)
        if peer.restarts_worker:
            await processes.start_worker()
        calls = [Call(*times) for times in await caller.answer(patience=600)]
        return calls[-1].ended - killed


def tell(line: str) -> None:
    """Print a line about progress."""
    print(line, file=sys.stderr, flush=True)


def is_in_memory(folder: Path) -> bool:
    """Return whether a folder is on a file system in memory; False if the system doesn't tell."""
    try:
        mounts = [line.split() for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    except OSError:
        return False
    inside = [(len(where), kind) for _, where, kind, *_ in mounts if folder.resolve().is_relative_to(where)]
    return max(inside, default=(0, ""))[1] in ("tmpfs", "ramfs")


def chosen(only: Sequence[str], published: str | None) -> list[Peer]:
    """Return the peers to measure; print the name of each skipped one."""
    found = []
    for peer in ALL:
        if only and peer.name not in only:
            continue
        if isinstance(peer, PublishedNexum):
            if published is None:
                tell(f"skipped: {peer.name}: start one, and name it with --published HOST:PORT")
                continue
            peer.address = published
        if (missing := peer.missing()) is not None:
            tell(f"skipped: {peer.name}: not installed: {missing}")
            continue
        found.append(peer)
    return found


def main() -> int:
    """Run the comparison from the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    names = [peer.name for peer in ALL]
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        choices=names,
        metavar="NAME",
        help=f"measure only this row; may be given several times: {', '.join(names)}",
    )
    parser.add_argument("--rounds", type=count(), default=5, help="number of rounds (default: %(default)s)")
    parser.add_argument("--calls", type=count(), default=200, help="calls one by one in a round (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one round of a few calls, to see whether it works")
    parser.add_argument("--published", metavar="HOST:PORT", help="a published Nexum server that is running")
    parser.add_argument("--folder", type=Path, help="where the databases are created (default: a temporary folder)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="write a chart as SVG")
    args = parser.parse_args()
    if args.calls < BLOCK:
        parser.error(f"give at least {BLOCK} calls")
    if args.folder is not None and not args.folder.is_dir():
        parser.error(f"{args.folder} is not a folder")
    peers = chosen(args.only, args.published)
    if not peers:
        parser.error("no peer is left to be measured")
    compile_modules()
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="compare-", ignore_cleanup_errors=True) as folder:
        if is_in_memory(Path(folder)) and not args.quick:
            parser.error(f"{folder} is in memory: name a folder on a disk with --folder")
        calls, together = (
            (BLOCK, IN_FLIGHT * 2) if args.quick else (args.calls, args.calls * 3 // IN_FLIGHT * IN_FLIGHT)
        )
        with contextlib.closing(PlainCommits(Path(folder))) as plain:
            comparison = Comparison(peers, Path(folder), plain, calls, max(together, IN_FLIGHT))
            rounds = 1 if args.quick else args.rounds
            asyncio.run(comparison.measure(rounds, set_up=not args.quick))
    rows = [row.figures() for row in comparison.rows.values()]
    machine = (
        f"{rounds} round(s) of {calls} calls; Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}, "
        f"{platform.system()}, {os.cpu_count()} processors"
    )
    print(f"{tables(rows)}\n")
    print(f"The unit: the median of a plain SQLite commit (synchronous=FULL) in the same turns, {_commit_range(rows)}.")
    print(f"{machine}\n\n{notes(rows)}")
    if args.json is not None:
        args.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    if args.chart is not None:
        args.chart.write_text(chart(rows, machine), encoding="utf-8")
    return 1 if any(row["failure"] for row in rows) else 0


def _commit_range(rows: Sequence[dict[str, object]]) -> str:
    commits = [float(str(row["commit_ms"])) for row in rows if "commit_ms" in row]
    return f"{min(commits):.2f} to {max(commits):.2f} ms" if commits else "not measured"


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
