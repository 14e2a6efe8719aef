"""Measure the cost of one durable call on each path, beside the floor and the bare limit, in the same run.

    python benchmarks/tool_call.py
    python benchmarks/tool_call.py --json

A call has 300 bytes of arguments, a no-op tool and 1 KB of result, on SQLite with synchronous=FULL. The paths:

- worker: submit_task with its session file, a server process and a worker process. Both run uvloop, if it is installed.
- replay: a repetition of a call whose result is recorded.
- owned: the caller records the start, executes the call itself, and records the result (nexum_engine.owner).
- event: an Owner records only the result, in one transaction. This is measured twice: through the server, and without a
  server. Without one, the benchmark's own process opens the database.
- reply: a model reply in a DurableSession (durable_autogen), in a separate process. The model answers at once.
- step: the time that a durable session adds to a step of an AutoGen agent, live and replayed. A step is a tool call and
  the reply after it. The added time is the median of the steps in durable_run.py's case `agent`, minus the median of
  the plain agent's steps.

The floor (floor.py) is two commits and two gRPC echoes; the bare limit (bare_limit.py) has the three processes and two
commits of a durable call over gRPC streams, without an engine. All paths take turns in blocks of ten calls, so that a
slow moment of the machine affects all of them. To compare machines, compare the ratios, not the times.
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
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from floor import (
    ARGUMENT,
    IN_FLIGHT,
    RESULT,
    ROOT,
    Floor,
    machine,
    machine_text,
    nexum_server,
    one_by_one,
    open_floor,
    per_second,
    process,
)

SCRIPT = str(Path(__file__).resolve())
sys.path.insert(0, str(ROOT))

from bare_limit import BareLimit, open_bare_limit  # noqa: E402 - the project is a folder of scripts, not a package

from nexum_engine import event_loop  # noqa: E402
from nexum_engine.client import NexumClient  # noqa: E402
from nexum_engine.embedded import EmbeddedNexum  # noqa: E402
from nexum_engine.options import count  # noqa: E402
from nexum_engine.owner import Owner  # noqa: E402
from nexum_engine.worker import Worker  # noqa: E402
from submit_task import Origin, Session  # noqa: E402
from support.tool_calls import bindings  # noqa: E402
from support.tools import tool  # noqa: E402
from support.tools.web.live import LiveWeb  # noqa: E402
from workflow import TOOL_CALL, ToolCallInput, ToolCallOutput  # noqa: E402

BLOCK = 10  # calls of one path, before the next path has its turn
STEP_REPLIES = 60  # replies of each agent
STEP_MODES = ("plain", "live", "replay")
PERCENTILES = (50, 95, 99)

Seconds = defaultdict[str, list[float]]


@tool(time_limit=60)
async def no_op(argument: str) -> str:
    """Return a text of one kilobyte."""
    return RESULT


# ---- The processes ---------------------------------------------------------------------------------------------------


async def work(address: str) -> None:
    """Run the worker process."""
    async with NexumClient(address) as client:
        worker = Worker(client, bindings(client, TOOL_CALL, LiveWeb()), concurrency=IN_FLIGHT)
        print("ready", flush=True)
        await worker.run(asyncio.Event())


async def reply(address: str) -> None:
    """Record model replies in this process. Each line of input is a number of replies. Print each reply's seconds."""
    from autogen_core.models import UserMessage
    from durable_run import Model

    from durable_autogen import DurableSession

    model = Model(lambda _: RESULT)
    async with DurableSession("replies", nexum=address):
        asked = [UserMessage(content=ARGUMENT, source="user")]
        print("ready", flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            print(json.dumps(await one_by_one(lambda: model.create(asked), int(line))), flush=True)


# ---- What is measured ------------------------------------------------------------------------------------------------


class Calls:
    """Makes durable calls: new ones, each with its own arguments, and their replays in the same order."""

    def __init__(self, session: Session, owner: Owner) -> None:
        self._session = session
        self._owner = owner
        self._made = self._replayed = self._owned = self._events = 0

    async def new(self) -> None:
        self._made += 1
        await self._call(self._made, Origin.EXECUTED)

    async def replay(self) -> None:
        self._replayed += 1
        await self._call(self._replayed, Origin.CACHED)

    async def _call(self, number: int, expected: Origin) -> None:
        result = await self._session.call("no_op", _arguments(number))
        if (result.text, result.origin) != (RESULT, expected):
            raise SystemExit(f"error: call {number} was {result.origin.value} instead of {expected.value}")

    async def owned(self) -> None:
        self._owned += 1
        input = ToolCallInput(tool_name="no_op", tool_args=_arguments(self._owned))
        started = await self._owner.start(TOOL_CALL, input, idempotency_key=f"owned:{self._owned}")
        assert started.task is not None
        await self._owner.complete(started.task, ToolCallOutput(result=RESULT))

    async def event(self) -> None:
        self._events += 1
        input = ToolCallInput(tool_name="no_op", tool_args=_arguments(self._events))
        await self._owner.record(TOOL_CALL, input, ToolCallOutput(result=RESULT), idempotency_key=f"e:{self._events}")


def _arguments(number: int) -> dict[str, str]:
    return {"argument": f"{number:08d}{ARGUMENT[8:]}"}


@asynccontextmanager
async def open_calls(address: str, session: str = "benchmark") -> AsyncIterator[Calls]:
    """Connect to the server for the length of a `with`; yield the calls."""
    async with (
        NexumClient(address) as client,
        Owner(client) as owner,
        Session(session, client=client) as opened,  # its end writes the session file, before the folder is removed
    ):
        yield Calls(opened, owner)


async def measure(rounds: int, calls: int, folder: Path) -> dict[str, Any]:
    """Run all measurements; return the figures."""
    os.chdir(folder)
    seconds: Seconds = defaultdict(list)
    rates: Seconds = defaultdict(list)
    async with (
        nexum_server(folder) as server,
        process([SCRIPT, "--work", server.address], cwd=folder) as worker,
        process([SCRIPT, "--reply", server.address], cwd=folder) as replies,
        open_floor(folder) as floor,
        open_bare_limit(folder) as bare,
        open_calls(server.address) as durable,
        EmbeddedNexum(None, owners=True) as here,
        open_calls(here.address) as without_server,
    ):
        if not here.embedded:
            raise SystemExit(
                f"error: a server on {here.address} answers: stop it, so that a call without one is measured"
            )
        cpu = dict.fromkeys(("server", "worker", "client"), 0.0)
        measured = {
            "bare_limit": bare.call,
            "floor": floor.floor,
            "replay": durable.replay,
            "owned": durable.owned,
            "event": durable.event,
            "event_here": without_server.event,
            "commits": floor.commits,
        }
        for _ in range(3):
            for call in (durable.new, *measured.values()):
                await one_by_one(call, BLOCK)
            await replies.ask(str(BLOCK))
        for number in range(rounds):
            print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
            for _ in range(calls // BLOCK):
                before = [server.cpu_seconds, worker.cpu_seconds, time.process_time()]
                seconds["worker"] += await one_by_one(durable.new, BLOCK)
                after = [server.cpu_seconds, worker.cpu_seconds, time.process_time()]
                cpu = {name: cpu[name] + end - begin for name, begin, end in zip(cpu, before, after, strict=True)}
                for name, call in measured.items():
                    seconds[name] += await one_by_one(call, BLOCK)
                seconds["reply"] += json.loads(await replies.ask(str(BLOCK)))
            await measure_steps(number, server.address, folder, seconds)
            await measure_rates(calls, durable, bare, floor, rates)
    return figures(seconds, rates, cpu)


async def measure_steps(number: int, address: str, folder: Path, seconds: Seconds) -> None:
    """Run an AutoGen agent plain, live and replayed, each time in a new process; add the seconds of its steps."""
    from durable_run import run_child

    for mode in STEP_MODES:
        run = await run_child("agent", mode, f"step-{number}", address, STEP_REPLIES, folder)
        seconds[f"step_{mode}"] += run.steps


async def measure_rates(calls: int, durable: Calls, bare: BareLimit, floor: Floor, rates: Seconds) -> None:
    """Make calls with 32 in flight; add the calls per second to `rates`."""
    rates["echo"].append(await per_second(floor.echo, calls * 10))
    rates["bare_limit"].append(await per_second(bare.call, calls * 3))
    rates["worker"].append(await per_second(durable.new, calls * 3))


# ---- Figures ---------------------------------------------------------------------------------------------------------


def figures(seconds: Seconds, rates: Seconds, cpu: dict[str, float]) -> dict[str, Any]:
    """Return the measurements in milliseconds and in calls per second, and their ratios."""
    calls = len(seconds["worker"])
    ms = {name: spread(found) for name, found in seconds.items()}
    for mode in STEP_MODES[1:]:
        added = median(seconds[f"step_{mode}"]) - median(seconds["step_plain"])
        ms[f"step_{mode}_added"] = {"p50": round(added * 1000, 3)}
    floor, bare, commit = ms["floor"]["p50"], ms["bare_limit"]["p50"], ms["commits"]["p50"] / 2
    rate = {name: round(median(found)) for name, found in rates.items()}
    return {
        **machine(),
        "sqlite": sqlite3.sqlite_version,
        "calls": calls,
        "ms": ms,
        "in_floors": {name: ratios(spread, floor) for name, spread in ms.items()},
        "in_bare_limits": {name: ratios(spread, bare) for name, spread in ms.items()},
        "in_commits": {name: ratios(spread, commit) for name, spread in ms.items()},
        "cpu_ms_of_a_call": {name: round(value / calls * 1000, 2) for name, value in cpu.items()},
        "per_second": rate,
        "of_echoes_per_second": {name: round(value / rate["echo"], 3) for name, value in rate.items()},
    }


def spread(seconds: list[float]) -> dict[str, float]:
    """Return the percentiles in milliseconds."""
    cuts = quantiles(seconds, n=100)
    return {f"p{p}": round(cuts[p - 1] * 1000, 3) for p in PERCENTILES}


def ratios(spread: dict[str, float], unit: float) -> dict[str, float]:
    """Return the percentiles, divided by `unit`."""
    return {p: round(value / unit, 2) for p, value in spread.items()}


ROWS = {
    "worker": "a call through a worker",
    "replay": "its replay",
    "owned": "an owned call",
    "event": "a recorded event",
    "event_here": "the same, without a server",
    "reply": "a recorded model reply",
    "step_live_added": "added to an agent's step",
    "step_replay_added": "the same, replayed",
    "floor": "floor: 2 commits + 2 echoes",
    "bare_limit": "bare limit: streams, no engine",
    "commits": "2 commits",
}


def table(found: dict[str, Any]) -> str:
    """Return the figures as a text table."""
    ms, floors, bare, commits = (found[key] for key in ("ms", "in_floors", "in_bare_limits", "in_commits"))
    lines = [
        f"{'':<32}{'p50':>8}{'p95':>8}{'p99':>8}    {'p50 in':>9}{'p99 in':>9}{'p50 in':>12}{'p50 in':>10}",
        f"{'':<32}{'ms':>8}{'ms':>8}{'ms':>8}    {'floors':>9}{'floors':>9}{'bare limits':>12}{'commits':>10}",
    ]
    for key, name in ROWS.items():
        times = "".join(f"{ms[key][f'p{p}']:>8.2f}" if f"p{p}" in ms[key] else f"{'':>8}" for p in PERCENTILES)
        p99 = f"{floors[key]['p99']:>9.2f}" if "p99" in floors[key] else f"{'':>9}"
        ratio = f"{floors[key]['p50']:>9.2f}{p99}{bare[key]['p50']:>12.2f}{commits[key]['p50']:>10.1f}"
        lines.append(f"{name:<32}{times}    {ratio}")
    rate, of_echo, cpu = found["per_second"], found["of_echoes_per_second"], found["cpu_ms_of_a_call"]
    lines += [
        "",
        f"{IN_FLIGHT} in flight: {rate['worker']:,} calls/s through a worker ({of_echo['worker']:.1%} of "
        f"{rate['echo']:,} echoes/s), bare limit {rate['bare_limit']:,} ({of_echo['bare_limit']:.1%})",
        f"CPU of a call through a worker: {', '.join(f'{name} {ms:.1f} ms' for name, ms in cpu.items())}",
        "",
        f"{'goals':<58}{'':>9}{'measured':>10}",
        *(
            f"{what:<58}{'at most' if most else 'at least':>9}{limit:>6}{value:>10}"
            f"{'' if (value <= limit) == most or value == limit else '   missed'}"
            for what, most, limit, value in goals(found)
        ),
        "",
        f"{found['calls']:,} calls on each path; SQLite {found['sqlite']}, {machine_text(found)}",
    ]
    return "\n".join(lines)


def goals(found: dict[str, Any]) -> Iterator[tuple[str, bool, float, float]]:
    """Yield each goal: its name, whether its limit is a maximum, the limit, and the measured value."""
    floors = found["in_floors"]
    yield "a call through a worker, p50, in floors", True, 1.5, floors["worker"]["p50"]
    yield "a call through a worker, p50, in bare limits", True, 2.2, found["in_bare_limits"]["worker"]["p50"]
    yield "a call through a worker, p99, in floors", True, 4.0, floors["worker"]["p99"]
    yield "its replay, p50, in floors", True, 0.4, floors["replay"]["p50"]
    yield "a recorded event, p50, in floors", True, 0.8, floors["event"]["p50"]
    yield "an event without a server, p50, in commits", True, 3.0, found["in_commits"]["event_here"]["p50"]
    yield "a recorded model reply, p50, in floors", True, 0.8, floors["reply"]["p50"]
    yield f"{IN_FLIGHT} in flight, calls a second, of the echoes", False, 0.35, found["of_echoes_per_second"]["worker"]


def main() -> int:
    """Run the benchmark from the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=count(), default=5, help="number of rounds (default: %(default)s)")
    parser.add_argument("--calls", type=count(), default=200, help="calls one by one in a round (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--work", metavar="HOST:PORT", help=argparse.SUPPRESS)
    parser.add_argument("--reply", metavar="HOST:PORT", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        event_loop.run(work(args.work))
        return 0
    if args.reply:
        asyncio.run(reply(args.reply))
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
