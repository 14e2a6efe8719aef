"""Measure the cost of a durable run against plain AutoGen, and against the floor (floor.py).

    python benchmarks/durable_run.py
    python benchmarks/durable_run.py --only agent --replies 1000
    python benchmarks/durable_run.py --without-server
    python benchmarks/durable_run.py --json

Each case runs three times, each time in a new process: without a durable session (plain), in one (live), and in the
same one again (replay). The server is a separate process on loopback, on SQLite with synchronous=FULL. With
--without-server, the process of the run opens the database.
The model is a script in the program's process and answers at once, so the times are only those of AutoGen and
durable_autogen. The cases:

- agent: one AssistantAgent; every second reply calls a tool with a result of 1 KB.
- team: a RoundRobinGroupChat of two such agents.
- results: one agent with 40 replies; the first five call a tool with a result of 1 MB. The model reads no message.
- requests: like `results`, but the model writes each request as JSON, as a real client does.
- sessions: 300 sessions in one event loop, each with two replies and a tool.
- busy: 30 such sessions, while another task calls asyncio.sleep(0) for ever.
- blocking: one reply with 20 calls of a tool that blocks for 0.3 s, on an executor of 32 threads.

A step is a tool and the reply after it; a turn has two replies and a tool. The floor of a call is two commits and two
gRPC echoes; with --without-server, it is only two commits. It is measured between the runs. To compare machines,
compare the ratios, not the times."""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.base import TaskResult
from autogen_agentchat.messages import TextMessage, ToolCallRequestEvent
from autogen_agentchat.teams import RoundRobinGroupChat
from autogen_core import FunctionCall
from autogen_core.models import ChatCompletionClient, CreateResult, LLMMessage, ModelInfo, RequestUsage
from floor import ROOT, machine, machine_text, nexum_server, one_by_one, open_floor
from pydantic import BaseModel

SCRIPT = str(Path(__file__).resolve())
sys.path.insert(0, str(ROOT))

from nexum_engine.options import count  # noqa: E402 - the project is a folder of scripts, not a package

MODES = ("plain", "live", "replay")
CASES = ("agent", "team", "results", "requests", "sessions", "busy", "blocking")
HUNDRED = 50  # turns: together they have a hundred replies
FLOORS = 100  # how often the floor (floor.py) is measured after each run
RESULT_BYTES = 1024
BIG_RESULTS = 5
BIG_RESULT_BYTES = 1_000_000
BIG_REPLIES = 40
SESSIONS = 300
SESSIONS_BESIDE = 30
BLOCKING_TOOLS = 20
BLOCKED_FOR = 0.3  # seconds
THREADS = 32


# ---- The programs ----------------------------------------------------------------------------------------------------


class Model(ChatCompletionClient):
    """A model that answers at once. `script` returns the reply with a given number."""

    component_type = "model"
    component_config_schema = BaseModel

    def __init__(self, script: Callable[[int], str | list[FunctionCall]], *, writes_requests: bool = False) -> None:
        self._script = script
        self._writes_requests = writes_requests
        self._replies = 0

    async def create(self, messages: Sequence[LLMMessage], **_: Any) -> CreateResult:
        """Return the next reply."""
        self._replies += 1
        if self._writes_requests:
            json.dumps([message.model_dump(mode="json") for message in messages]).encode()
        content = self._script(self._replies)
        reason: Any = "stop" if isinstance(content, str) else "function_calls"
        return CreateResult(finish_reason=reason, content=content, usage=self.actual_usage(), cached=False)

    async def create_stream(self, messages: Sequence[LLMMessage], **_: Any) -> AsyncGenerator[str | CreateResult, None]:
        """Yield the next reply."""
        yield await self.create(messages)

    async def close(self) -> None:
        """Do nothing: this model holds no connection."""

    def actual_usage(self) -> RequestUsage:
        """Return the same usage for each reply."""
        return RequestUsage(prompt_tokens=10, completion_tokens=10)

    def total_usage(self) -> RequestUsage:
        """Return the same usage for each reply."""
        return self.actual_usage()

    def count_tokens(self, messages: Sequence[LLMMessage], **_: Any) -> int:
        """Return a constant: the agents don't depend on it."""
        return 1

    def remaining_tokens(self, messages: Sequence[LLMMessage], **_: Any) -> int:
        """Return a constant: the agents don't depend on it."""
        return 1000

    @property
    def capabilities(self) -> Any:
        """The model's abilities, as AutoGen requires them."""
        return self.model_info

    @property
    def model_info(self) -> ModelInfo:
        """The model's abilities, as AutoGen requires them."""
        return ModelInfo(
            vision=False, function_calling=True, json_output=True, structured_output=False, family="unknown"
        )


def text(number: int) -> str:
    """Return a reply of 200 characters."""
    return f"reply {number} ".ljust(200, ".")


def call(tool: str, number: int, calls: int = 1) -> list[FunctionCall]:
    """Return a reply that calls a tool, once or several times."""
    return [
        FunctionCall(id=f"call-{number}-{n}", name=tool, arguments=json.dumps({"argument": f"{number}-{n}"}))
        for n in range(calls)
    ]


async def look_up(argument: str) -> str:
    """Return a text of one kilobyte."""
    return argument.ljust(RESULT_BYTES, "y")


async def read_file(argument: str) -> str:
    """Return lines of text, one megabyte in all."""
    line = f'a line of the file {argument} with some words and a "quoted" one\n'
    return (line * (BIG_RESULT_BYTES // len(line) + 1))[:BIG_RESULT_BYTES]


def block(argument: str) -> str:
    """Block the thread for BLOCKED_FOR seconds."""
    time.sleep(BLOCKED_FOR)
    return argument


def alternating(number: int) -> str | list[FunctionCall]:
    """Return the reply with this number: a tool call for an odd number, and a text for an even one."""
    return call("look_up", number) if number % 2 else text(number)


def agent(
    script: Callable[[int], str | list[FunctionCall]],
    tool: Callable[..., Any] = look_up,
    *,
    name: str = "agent",
    tool_rounds: int = 1,
    writes_requests: bool = False,
) -> AssistantAgent:
    """Build an agent with a scripted model and one tool."""
    model = Model(script, writes_requests=writes_requests)
    return AssistantAgent(name, model, tools=[tool], max_tool_iterations=tool_rounds + 1)


@dataclass
class Measured:
    """The times and the memory of one run."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    """CPU time of the program's process."""
    peak_mb: float = 0.0
    """Peak memory of the program's process."""
    steps: list[float] = field(default_factory=list)
    """Seconds of each step: a tool and the reply after it."""
    turns: list[float] = field(default_factory=list)
    """Seconds of each turn."""


class Program:
    """One run of a case."""

    def __init__(self, mode: str, session: str, nexum: str | None) -> None:
        self._mode = mode
        self._session = session
        self._nexum = nexum
        self.measured = Measured()
        self._turn_began = self._tool_called = 0.0

    @asynccontextmanager
    async def session(self, number: int = 0) -> AsyncIterator[None]:
        """Open a durable session, unless the run is plain."""
        if self._mode == "plain":
            yield
            return
        from durable_autogen import DurableSession

        async with DurableSession(f"{self._session}-{number}", nexum=self._nexum):
            yield

    def saw(self, item: object) -> None:
        """Note the time of a message. A message ends a step or a turn, or shows that a tool is called."""
        now = time.perf_counter()
        if isinstance(item, ToolCallRequestEvent):
            self._tool_called = now
        elif isinstance(item, TextMessage) and item.source != "user":
            if self._tool_called:
                self.measured.steps.append(now - self._tool_called)
            if self._turn_began:
                self.measured.turns.append(now - self._turn_began)
            self._turn_began, self._tool_called = now, 0.0

    async def agent(self, replies: int) -> None:
        """Run one agent, with a task for each of its turns."""
        one = agent(alternating)
        async with self.session():
            for number in range(replies // 2):
                async for item in one.run_stream(task=f"task {number}"):
                    self.saw(item)

    async def team(self, replies: int) -> None:
        """Run a team of two."""
        members = [agent(alternating, name=name) for name in ("one", "other")]
        team = RoundRobinGroupChat(list(members), max_turns=replies // 2)
        async with self.session():
            async for item in team.run_stream(task="the task"):
                self.saw(item)

    async def results(self, replies: int, *, writes_requests: bool = False) -> None:
        """Run one agent with big tool results. Each later request contains all these results."""

        def script(number: int) -> str | list[FunctionCall]:
            return call("read_file", number) if number <= BIG_RESULTS else text(number)

        one = agent(script, read_file, tool_rounds=BIG_RESULTS, writes_requests=writes_requests)
        async with self.session():
            for number in range(BIG_REPLIES - BIG_RESULTS):
                result = await one.run(task=f"task {number}")
                assert isinstance(result, TaskResult)

    async def requests(self, replies: int) -> None:
        """Run the case `results` with a model that writes each request as JSON."""
        await self.results(replies, writes_requests=True)

    async def sessions(self, replies: int) -> None:
        """Run many sessions at once."""
        await asyncio.gather(*(self._one_of_many(number) for number in range(SESSIONS)))

    async def busy(self, replies: int) -> None:
        """Run sessions beside a task that never lets the event loop be idle."""

        async def never_idle() -> None:
            while True:  # noqa: ASYNC110 - a busy loop is what is measured
                await asyncio.sleep(0)

        beside = asyncio.create_task(never_idle())
        await asyncio.gather(*(self._one_of_many(number) for number in range(SESSIONS_BESIDE)))
        beside.cancel()

    async def _one_of_many(self, number: int) -> None:
        async with self.session(number):
            await agent(alternating).run(task="the task")

    async def blocking(self, replies: int) -> None:
        """Call many blocking tools at once, on the program's own threads."""

        def script(number: int) -> str | list[FunctionCall]:
            return call("block", number, BLOCKING_TOOLS) if number == 1 else text(number)

        with ThreadPoolExecutor(THREADS) as executor:
            asyncio.get_running_loop().set_default_executor(executor)
            async with self.session():
                await agent(script, block).run(task="the task")


def run_case(case: str, mode: str, session: str, nexum: str | None, replies: int) -> Measured:
    """Run a case in this process."""
    program = Program(mode, session, nexum)
    if mode != "plain":
        import durable_autogen  # noqa: F401 - import it before the measurement; a plain run doesn't use it
    gc.collect()
    begun, cpu_begun = time.perf_counter(), time.process_time()
    asyncio.run(getattr(program, case)(replies))
    measured = program.measured
    measured.seconds = time.perf_counter() - begun
    measured.cpu_seconds = time.process_time() - cpu_begun
    measured.peak_mb = peak_mb()
    return measured


def peak_mb() -> float:
    """Return this process's peak memory in MB; 0 if the system doesn't report it."""
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024 * 1024 if sys.platform == "darwin" else 1024)


# ---- Measuring -------------------------------------------------------------------------------------------------------


async def measure(
    cases: Sequence[str], rounds: int, replies: int, folder: Path, *, without_server: bool
) -> dict[str, Any]:
    """Run the cases; return the figures."""
    runs: dict[str, dict[str, list[Measured]]] = {case: {mode: [] for mode in MODES} for case in cases}
    floors: list[float] = []
    async with nexum_server(folder) as server, open_floor(folder) as floor:
        nexum = "" if without_server else server.address
        one_floor = floor.commits if without_server else floor.floor
        await one_by_one(one_floor, 30)
        for number in range(rounds):
            for case in cases:
                for mode in MODES:
                    print(f"round {number + 1} of {rounds}: {case}, {mode}", file=sys.stderr, flush=True)
                    measured = await run_child(case, mode, f"{case}-{number}", nexum, replies, folder)
                    runs[case][mode].append(measured)
                    floors += await one_by_one(one_floor, FLOORS)
    floor_ms = median(floors) * 1000
    return {
        **machine(),
        "rounds": rounds,
        "replies": replies,
        "floor": "2 commits" if without_server else "2 commits + 2 echoes",
        "floor_ms": round(floor_ms, 3),
        "cases": {case: figures(case, runs[case], floor_ms) for case in cases},
    }


async def run_child(case: str, mode: str, session: str, nexum: str, replies: int, folder: Path) -> Measured:
    """Run a case in a new process."""
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        *(SCRIPT, "--child", case, mode, session, nexum, "--replies", str(replies)),
        cwd=folder,
        stdout=subprocess.PIPE,
    )
    try:
        output, _ = await child.communicate()
    finally:
        with suppress(ProcessLookupError):
            child.kill()
    if child.returncode != 0:
        raise SystemExit(f"error: the run of {case} ({mode}) failed; its error is above")
    return Measured(**json.loads(output.decode().splitlines()[-1]))


def figures(case: str, runs: dict[str, list[Measured]], floor_ms: float) -> dict[str, Any]:
    """Compute a case's figures: medians of the rounds, and their ratios to the plain run and to the floor."""
    found: dict[str, Any] = {}
    for mode in MODES:
        found[mode] = {
            "seconds": round(median(one.seconds for one in runs[mode]), 3),
            "cpu_seconds": round(median(one.cpu_seconds for one in runs[mode]), 3),
            "peak_mb": round(median(one.peak_mb for one in runs[mode]), 1),
        }
        if case in ("agent", "team"):
            for name in ("steps", "turns"):
                first = median(median(getattr(one, name)[:HUNDRED]) for one in runs[mode]) * 1000
                last = median(median(getattr(one, name)[-HUNDRED:]) for one in runs[mode]) * 1000
                found[mode][name] = {"first_ms": round(first, 2), "last_ms": round(last, 2)}
                found[mode][name]["last_to_first"] = round(last / first, 2)
    plain = found["plain"]
    for mode in ("live", "replay"):
        found[mode]["of_plain"] = round(found[mode]["seconds"] / plain["seconds"], 1)
        if plain["peak_mb"]:
            found[mode]["memory_of_plain"] = round(found[mode]["peak_mb"] / plain["peak_mb"], 2)
        for name in ("steps", "turns"):
            if name in plain:
                for part in ("first", "last"):
                    over = found[mode][name][f"{part}_ms"] - plain[name][f"{part}_ms"]
                    found[mode][name][f"{part}_over_plain_floors"] = round(over / floor_ms, 1)
    return found


# ---- Output ----------------------------------------------------------------------------------------------------------


def table(found: dict[str, Any]) -> str:
    """Return the figures as a table."""
    lines = [f"the floor, {found['floor']}: {found['floor_ms']:.2f} ms"]
    paced = [case for case in ("agent", "team") if case in found["cases"]]
    if paced:
        lines += [
            "",
            f"{'a run of ' + format(found['replies'], ',') + ' replies':<28}{'first 100':>11}{'last 100':>11}"
            f"{'last/first':>12}   over plain, in floors: first, last",
        ]
    for case in paced:
        for name, what in (("steps", "a step, ms"), ("turns", "a turn, ms")):
            for mode in MODES:
                one = found["cases"][case][mode][name]
                over = (
                    ""
                    if mode == "plain"
                    else f"{one['first_over_plain_floors']:>17.1f}{one['last_over_plain_floors']:>8.1f}"
                )
                lines.append(
                    f"{f'{case}, {what}, {mode}':<28}{one['first_ms']:>11.2f}{one['last_ms']:>11.2f}"
                    f"{one['last_to_first']:>12.2f}{over}"
                )
    lines += ["", f"{'a whole run':<28}{'seconds':>11}{'of plain':>11}{'CPU s':>12}{'peak MB':>12}{'of plain':>11}"]
    for case, modes in found["cases"].items():
        for mode in MODES:
            one = modes[mode]
            times, memory = one.get("of_plain", ""), one.get("memory_of_plain", "")
            lines.append(
                f"{f'{case}, {mode}':<28}{one['seconds']:>11.2f}{times:>11}{one['cpu_seconds']:>12.2f}"
                f"{one['peak_mb']:>12.0f}{memory:>11}"
            )
    lines += ["", f"{'goals':<58}{'at most':>9}{'measured':>10}"]
    lines += [
        f"{what:<58}{limit:>9}{value:>10}{'' if value <= limit else '   missed'}"
        for what, limit, value in goals(found["cases"])
    ]
    lines += [
        "",
        f"{found['rounds']} round(s), medians; {machine_text(found)}",
    ]
    return "\n".join(lines)


def goals(cases: dict[str, Any]) -> Iterator[tuple[str, float, float]]:
    """Yield each goal with its limit and the measured value."""
    for case in ("agent", "team"):
        if case in cases:
            for mode in ("live", "replay"):
                steps = cases[case][mode]["steps"]
                yield f"{case}, {mode}: last hundred replies to the first", 1.2, steps["last_to_first"]
            live = cases[case]["live"]["steps"]
            yield f"{case}, live: floors a step over plain, first hundred", 4.0, live["first_over_plain_floors"]
            yield f"{case}, live: floors a step over plain, last hundred", 4.0, live["last_over_plain_floors"]
    if "requests" in cases:
        for mode, limit in (("live", 8.0), ("replay", 6.0)):
            yield f"requests, {mode}: times plain", limit, cases["requests"][mode]["of_plain"]
            if "memory_of_plain" in cases["requests"][mode]:
                yield f"requests, {mode}: memory, times plain", 1.5, cases["requests"][mode]["memory_of_plain"]
    for case, what, limit in (
        ("sessions", f"{SESSIONS} sessions in one loop, live: seconds", 5.0),
        ("busy", f"{SESSIONS_BESIDE} sessions beside a busy task, live: seconds", 0.5),
        ("blocking", f"{BLOCKING_TOOLS} blocking tools, live: seconds", 0.4),
    ):
        if case in cases:
            yield what, limit, cases[case]["live"]["seconds"]


def main() -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replies", type=count(), default=300, help="of agent and team (default: %(default)s)")
    parser.add_argument("--rounds", type=count(), default=3, help="runs of each case (default: %(default)s)")
    parser.add_argument(
        "--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help="run only these cases"
    )
    parser.add_argument("--without-server", action="store_true", help="let each run open the database itself")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--child", nargs=4, metavar=("CASE", "MODE", "SESSION", "HOST:PORT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        case, mode, session, nexum = args.child
        print(json.dumps(asdict(run_case(case, mode, session, nexum or None, args.replies))))
        return 0
    if args.rounds < 1 or args.replies < 4 * HUNDRED or args.replies % 2:
        parser.error(f"give at least 1 round, and an even number of at least {4 * HUNDRED} replies")
    with tempfile.TemporaryDirectory() as folder:
        measuring = measure(args.only, args.rounds, args.replies, Path(folder), without_server=args.without_server)
        found = asyncio.run(measuring)
    print(json.dumps(found, indent=2) if args.json else table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
