"""Compare how an interrupted graph resumes in plain AutoGen and in a durable run.

The comparison has two halves, with the same graph and the same point of interruption. The plain half uses AutoGen's
save_state and load_state. The durable half is a durable run. In each half, one process runs until the interruption, and
another process resumes. The printed lines report what happened with the installed AutoGen (see microsoft/autogen#7043).
"""

from __future__ import annotations

import asyncio
import json
import secrets
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nexum_engine.client import NexumClient
from nexum_engine.embedded import EmbeddedNexum, start_child
from support.console import let_ctrl_c_cancel, say
from support.graphflow.graphs import CYCLIC, IN_A_ROW, Graph
from support.graphflow.process import REPORT, STATE
from support.models import ModelChoice
from support.processes import CANT_RUN

if TYPE_CHECKING:
    from durable_autogen.record.events import Event

PART_TIMEOUT = 300.0  # seconds for one process; live models may be slow


@dataclass(frozen=True)
class Part:
    """An ended process of the comparison."""

    pid: int
    code: int
    asked: Sequence[str]
    """The agents that called a model in this process, in the order of the calls."""
    spoke: Sequence[str] = ()
    """The agents whose messages are in the team's result; empty if the team didn't finish in this process."""
    stop_reason: str | None = None

    def __str__(self) -> str:
        calls = f"model calls by {', '.join(self.asked)}" if self.asked else "no agent called its model"
        end = f"{'failed' if self.code in CANT_RUN else 'killed'} (exit {self.code})" if self.code else "ended normally"
        return f"process {self.pid}: {calls}; {end}"


class Stage:
    """The graph, options and folder of one comparison."""

    def __init__(self, graph: Graph, *, offline: bool, folder: Path) -> None:
        self.graph, self._offline, self.folder = graph, offline, folder

    async def part(self, name: str, *arguments: str) -> Part:
        """Run one process to its end, and print its lines."""
        command = ["-m", "support.graphflow.process", name, "--folder", str(self.folder), *arguments]
        command += ["--cyclic"] if self.graph is CYCLIC else []
        command += ["--offline"] if self._offline else []
        child = await start_child(command, quiet=False)
        report: dict[str, Any] = {}

        async def read() -> None:
            assert child.process.stdout is not None
            async for raw in child.process.stdout:
                line = raw.decode("utf-8", "replace").rstrip()
                if line.startswith(REPORT):
                    report.update(json.loads(line.removeprefix(REPORT)))
                elif line:
                    say(f"    {line}")

        try:
            await asyncio.wait_for(read(), PART_TIMEOUT)
            code = await child.process.wait()
        finally:
            await child.end()
        log = self.folder / name
        return Part(child.process.pid, code, log.read_text("utf-8").split() if log.exists() else [], **report)


async def compare(*, cyclic: bool, model: ModelChoice, nexum: str | None) -> list[str]:
    """Run the plain half and then the durable half. Return a phrase for each check that the durable half failed."""
    let_ctrl_c_cancel()
    graph = CYCLIC if cyclic else IN_A_ROW
    say(f"[demo] AutoGen {version('autogen-agentchat')}")
    say(f"[demo] {graph.name} of four agents ({', '.join(graph.agents)}), interrupted {graph.how}")
    with tempfile.TemporaryDirectory(prefix="graphflow-") as name:
        stage = Stage(graph, offline=model.offline, folder=Path(name))
        # Connect to the server before the plain half: if the server can't record runs, the comparison ends at once.
        async with EmbeddedNexum(nexum, owners=True) as server:
            await show_plain(stage)
            return await show_durable(stage, server.address)


async def show_plain(stage: Stage) -> None:
    """Run the plain half and print what happens."""
    graph = stage.graph
    say("\n=== AutoGen alone: save_state, load_state ===")
    first = await stage.part("plain-first")
    say(f"[plain] {first}")
    if not (stage.folder / STATE).exists():
        say("[plain] the state was not saved, so there is nothing to resume")
        return
    say("[plain] the team's state is saved; a new process loads it and runs the team")
    second = await stage.part("plain-resume")
    say(f"[plain] {second}")
    say(f"[plain] AutoGen reports: {second.stop_reason!r}")
    cut_off = {graph.at_agent} if first.code else set()
    spoke = (set(first.asked) - cut_off) | set(second.spoke)
    never = [agent for agent in graph.agents if agent not in spoke]
    if never:
        say(f"[plain] the team did not resume: {', '.join(never)} never spoke, but the run ended as finished")
    else:
        say(f"[plain] the team resumed: after loading, {', '.join(second.spoke)} spoke")


async def show_durable(stage: Stage, nexum: str) -> list[str]:
    """Run the durable half and print what happens. Return a phrase for each failed check."""
    from durable_autogen.record.events import Kind, read_record

    graph = stage.graph
    session = f"graphflow-{secrets.token_hex(4)}"
    say("\n=== The same team as a durable run: killed at the same point, and run again ===")
    async with NexumClient(nexum) as client:

        async def replies() -> list[Event]:
            return [event for event in (await read_record(client, session)).events if event.kind is Kind.REPLY]

        where = ("--session", session, "--nexum", nexum)
        first = await stage.part("durable-first", *where)
        before = await replies()
        say(f"[durable] {first}")
        say(f"[durable] recorded by then: {', '.join(str(event) for event in before) or 'nothing'}")
        begun = time.monotonic()
        second = await stage.part("durable-again", *where)
        say(f"[durable] {second}, {time.monotonic() - begun:.1f} s")
        after = await replies()
    wrong = []
    if first.code == 0 or not before:
        wrong.append("the first process was not killed after a recorded reply")
    if second.code != 0:
        wrong.append("the second process did not finish")
    if [event.content for event in after[: len(before)]] != [event.content for event in before]:
        wrong.append("a recorded reply has changed")
    live = Counter(second.asked)
    if live != Counter(event.agent for event in after[len(before) :]):
        wrong.append(f"the second process made other calls than it recorded: {dict(live)}")
    missing = [agent for agent in graph.agents if agent not in {event.agent for event in after}]
    if missing:
        wrong.append(f"{', '.join(missing)} never spoke")
    if not wrong:
        say(
            f"[durable] the run finished: {', '.join(second.spoke)} spoke, in this order. {len(before)} "
            f"recorded call(s) were replayed, none was repeated; {len(second.asked)} were made live "
            f"(session {session})"
        )
    return wrong
