"""Measure how long calls take while a server prunes 10,000 executions, and how long without a pruning.

    python benchmarks/prune.py
    python benchmarks/prune.py --executions 50000 --json

Each execution has 300 bytes of arguments and 1 KB of result. Half of the executions are in sessions of 100. Calls go
through a worker, as in tool_call.py: first one by one, then with 32 in flight. In each case, calls are measured before
a pruning and during it. The goal: the median during a pruning is at most 1.5 times the median before it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from floor import ARGUMENT, IN_FLIGHT, RESULT, ROOT, machine, machine_text, nexum_server, process

sys.path.insert(0, str(ROOT))

from tool_call import SCRIPT as WORKER
from tool_call import Calls, open_calls

from nexum_engine.client import NexumClient
from nexum_engine.clock import ManualClock
from nexum_engine.options import count
from nexum_engine.store import executions, open_store, tasks
from workflow import TOOL_CALL

DAY = 86_400.0  # seconds
SESSION = 100  # executions
GOAL = 1.5
Seconds = defaultdict[str, list[float]]
CASES = {"one by one": 1, f"{IN_FLIGHT} in flight": IN_FLIGHT}


async def fill(database: Path, number: int, days: float) -> None:
    """Record executions that ended `days` days ago."""
    clock = ManualClock(round((time.time() - days * DAY) * 1000))
    store = await open_store(f"sqlite:///{database}", clock)
    workflow_id, version = "agent-event", "v1"
    await store.run(executions.register_workflow, workflow_id, version, TOOL_CALL.ir_json)
    input_json, output_json = json.dumps(ARGUMENT), json.dumps(RESULT)

    async def record(one: int) -> None:
        # Choose the keys so that neighbors in the file are not neighbors in the index of keys.
        key = f"s{days:g}-{one // SESSION}/{one * 7919 % 1_000_003}" if one % 200 < SESSION else f"{days:g}-{one}"
        await store.run(tasks.start_owned, workflow_id, version, input_json, key, "owner", 30_000, "", output_json)

    for first in range(0, number, 500):
        await asyncio.gather(*(record(one) for one in range(first, min(first + 500, number))))
    await store.close()


async def call_until(done: asyncio.Event, calls: Calls, in_flight: int) -> list[float]:
    """Make calls until `done` is set; return the seconds of each."""
    seconds: list[float] = []

    async def keep_calling() -> None:
        while not done.is_set():
            begun = time.perf_counter()
            await calls.new()
            seconds.append(time.perf_counter() - begun)

    await asyncio.gather(*(keep_calling() for _ in range(in_flight)))
    return seconds


async def prune(client: NexumClient, days: float, done: asyncio.Event) -> int:
    """Prune the executions that ended `days` days ago or earlier; return how many were pruned."""
    after, found = 0, 0
    try:
        while True:
            part = await client.prune((days - 0.5) * DAY, after=after)
            found += part.executions
            if part.after is None:
                return found
            after = part.after
    finally:
        done.set()


async def measure(number: int, rounds: int) -> dict[str, Any]:
    """Run all measurements; return the figures."""
    found: dict[str, Any] = {**machine(), "executions": number, "rounds": rounds}
    seconds: defaultdict[str, Seconds] = defaultdict(lambda: defaultdict(list))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.chdir(folder)
        sets = [(case, 30.0 * rounds * len(CASES) - 30.0 * at) for at, case in enumerate([*CASES] * rounds)]
        for _, days in sets:
            await fill(folder / "nexum.db", number, days)
        async with (
            nexum_server(folder) as server,
            process([WORKER, "--work", server.address], cwd=folder),
            open_calls(server.address) as calls,
            NexumClient(server.address) as client,
        ):
            for case, days in sets:
                print(case, file=sys.stderr, flush=True)
                await measure_case(client, calls, CASES[case], days, number, seconds[case])
        os.chdir(ROOT)
    found["cases"] = {case: figures(seconds[case]) for case in CASES}
    return found


async def measure_case(
    client: NexumClient, calls: Calls, in_flight: int, days: float, number: int, seconds: Seconds
) -> None:
    """Measure calls first without a pruning, and then while one set of executions is pruned."""
    for what, length in (("warm-up", 0.5), ("alone", 4.0)):
        done = asyncio.Event()
        asyncio.get_running_loop().call_later(length, done.set)
        seconds[what] += await call_until(done, calls, in_flight)
    done = asyncio.Event()
    begun = time.perf_counter()
    pruning = asyncio.create_task(prune(client, days, done))
    seconds["pruning"] += await call_until(done, calls, in_flight)
    seconds["run"].append(time.perf_counter() - begun)
    if (pruned := await pruning) != number:
        raise SystemExit(f"error: {pruned} executions were pruned instead of {number}")


def figures(seconds: Seconds) -> dict[str, Any]:
    """Return the figures of one case."""
    ratio = median(seconds["pruning"]) / median(seconds["alone"])
    spreads = {what: spread(seconds[what]) for what in ("alone", "pruning")}
    return {**spreads, "ratio_of_p50": round(ratio, 2), "seconds": round(median(seconds["run"]), 2)}


def spread(seconds: list[float]) -> dict[str, float]:
    """Return the number of calls, and percentiles in milliseconds."""
    cuts = quantiles(seconds, n=100)
    percentiles = {f"p{p}": round(cuts[p - 1] * 1000, 2) for p in (50, 95, 99)}
    return {"calls": len(seconds), **percentiles, "max": round(max(seconds) * 1000, 1)}


def table(found: dict[str, Any]) -> str:
    """Return the figures as a text table."""
    lines = [f"{'':<26}{'calls':>8}{'p50 ms':>9}{'p95 ms':>9}{'p99 ms':>9}{'max ms':>9}"]
    for case, figures in found["cases"].items():
        for what in ("alone", "pruning"):
            one = figures[what]
            numbers = "".join(f"{one[name]:>9.2f}" for name in ("p50", "p95", "p99", "max"))
            lines.append(f"{f'{case}, {what}':<26}{one['calls']:>8,}{numbers}")
        ratio = figures["ratio_of_p50"]
        missed = "" if ratio <= GOAL else "   missed"
        lines += [
            f"    {found['executions']:,} executions in {figures['seconds']:.1f} s; "
            f"p50 {ratio:.2f} times, at most {GOAL}{missed}",
        ]
    return "\n".join([*lines, "", f"{found['rounds']} rounds; {machine_text(found)}"])


def main() -> int:
    """Run the benchmark from the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--executions", type=count(), default=10_000, help="how many are pruned in each case (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=count(), default=3, help="number of rounds (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    with contextlib.redirect_stdout(io.StringIO()):  # submit_task prints a line for each call
        found = asyncio.run(measure(args.executions, args.rounds))
    print(json.dumps(found, indent=2) if args.json else table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
