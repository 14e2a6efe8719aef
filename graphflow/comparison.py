"""What becomes of an interrupted AutoGen GraphFlow, without and with a record: microsoft/autogen#7043, shown live.

The same four agents are interrupted at the same place twice: first as AutoGen has it, with save_state and load_state,
then as a durable run that is killed and run again. What is printed is what happened, on the AutoGen that is installed.
`crash_demo.py --graphflow` and `--cyclic` call `compare`. Needs nothing else running.

    python graphflow_demo.py              # a graph in a row, interrupted while an agent works
    python graphflow_demo.py --cyclic     # a loop, stopped between two rounds
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import secrets
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from console import accept_any_character, complain, let_ctrl_c_cancel, say
from launcher import NexumForRun, kill_this_process, start_child
from models import ModelChoice, ModelChoiceError, choose_model
from nexum_engine.client import NexumClient
from nexum_engine.errors import NexumError

if TYPE_CHECKING:
    from autogen_agentchat.teams import GraphFlow
    from autogen_core.models import ChatCompletionClient

    from durable_autogen.journal import Event

HERE = str(Path(__file__).resolve())
TASK = "Write two sentences on why idempotency keys matter."
PART_TIMEOUT = 300.0  # seconds for one process; live models may be slow
RESUME_TIMEOUT = 60.0  # seconds in which a resumed team has to end
STOP_ROUNDS = 2  # the reviewer sends back so many drafts
PLAIN, DURABLE = "plain", "durable"


@dataclass(frozen=True)
class Graph:
    """A graph of four agents, and where it is interrupted: before the n-th reply of an agent."""

    name: str
    agents: tuple[str, ...]
    roles: Mapping[str, str]
    at_agent: str
    at_reply: int
    how: str

    def team(self, clients: Callable[[str], ChatCompletionClient]) -> GraphFlow:
        """The team, each agent with a model client of its own."""
        from autogen_agentchat.agents import AssistantAgent
        from autogen_agentchat.conditions import MaxMessageTermination
        from autogen_agentchat.teams import DiGraphBuilder
        from autogen_agentchat.teams import GraphFlow as Flow

        agents = {
            name: AssistantAgent(name, clients(name), system_message=self.roles[name], description=name)
            for name in self.agents
        }
        builder = DiGraphBuilder()
        for agent in agents.values():
            builder.add_node(agent)
        chain = list(agents.values())
        if self is CYCLIC:
            planner, author, reviewer, publisher = chain
            builder.add_edge(planner, author, activation_group="start")
            builder.add_edge(author, reviewer)
            builder.add_edge(reviewer, author, activation_group="again", condition=wants_changes)
            builder.add_edge(reviewer, publisher, condition=is_content)
        else:
            for one, other in itertools.pairwise(chain):
                builder.add_edge(one, other)
        return Flow(list(chain), builder.build(), termination_condition=MaxMessageTermination(20))


def wants_changes(message: Any) -> bool:
    """Whether the reviewer sends the draft back."""
    return "REVISE" in message.to_model_text()


def is_content(message: Any) -> bool:
    """Whether the reviewer lets the draft pass."""
    return not wants_changes(message)


IN_A_ROW = Graph(
    name="a graph in a row",
    agents=("researcher", "analyst", "editor", "publisher"),
    roles={
        "researcher": "List three facts on the question, briefly.",
        "analyst": "Pick the two facts that matter most, and say why in one sentence.",
        "editor": "Write the two sentences that were asked for.",
        "publisher": "Give the text a title and print both.",
    },
    at_agent="analyst",
    at_reply=1,
    how="while the analyst works",
)
CYCLIC = Graph(
    name="a loop",
    agents=("planner", "author", "reviewer", "publisher"),
    roles={
        "planner": "Say in one sentence what the text has to contain.",
        "author": "Write the text, or write it anew as the reviewer says. Only the text.",
        "reviewer": f"Answer the first {STOP_ROUNDS} drafts with REVISE: and one wish, the next one with APPROVED.",
        "publisher": "Give the approved text a title and print both.",
    },
    at_agent="author",
    at_reply=2,
    how="between two rounds, after the reviewer's first REVISE",
)


# ---- Models ----------------------------------------------------------------------------------------------------------


def rehearsed_reply(agent: str, said: Sequence[str]) -> str:
    """What an agent says without a model: no two calls are worded alike, so that a repeated one would show."""
    token = secrets.token_hex(3)
    if agent == "reviewer":
        drafts = sum(1 for text in said if "raft" in text and "REVISE" not in text and "Plan" not in text)
        return f"REVISE: shorter, please ({token})" if drafts <= STOP_ROUNDS else f"APPROVED ({token})"
    first = {"author": "Draft", "planner": "Plan", "publisher": "Published"}.get(agent, f"The {agent}'s words")
    return f"{first} {token}: the same key, the same effect, once."


def watched_client(
    agent: str, model: ModelChoice, log: Path, before_reply: Callable[[int], Awaitable[None]]
) -> ChatCompletionClient:
    """The agent's model; each live call is written down, and `before_reply` may interrupt it."""
    from autogen_core.models import ChatCompletionClient as Client
    from autogen_core.models import CreateResult, LLMMessage, ModelFamily, ModelInfo, RequestUsage, SystemMessage
    from pydantic import BaseModel

    inner = None if model.offline else model.client()

    class Watched(Client):
        component_type = "model"
        component_config_schema = BaseModel
        calls = 0

        async def create(self, messages: Sequence[LLMMessage], **options: Any) -> CreateResult:
            self.calls += 1
            with log.open("a", encoding="utf-8") as file:
                file.write(f"{os.getpid()} {agent}\n")
            await before_reply(self.calls)
            if inner is not None:
                return await inner.create(messages, **options)
            await asyncio.sleep(0.05)
            said = [str(message.content) for message in messages if not isinstance(message, SystemMessage)]
            usage = RequestUsage(prompt_tokens=sum(len(text.split()) for text in said), completion_tokens=10)
            text = rehearsed_reply(agent, said)
            return CreateResult(finish_reason="stop", content=text, usage=usage, cached=False)

        async def create_stream(self, *args: Any, **options: Any) -> AsyncGenerator[str | CreateResult, None]:
            yield await self.create(*args, **options)

        async def close(self) -> None:
            if inner is not None:
                await inner.close()

        def actual_usage(self) -> RequestUsage:
            return RequestUsage(prompt_tokens=0, completion_tokens=0)

        def total_usage(self) -> RequestUsage:
            return self.actual_usage()

        def count_tokens(self, messages: Sequence[LLMMessage], **_: Any) -> int:
            return sum(len(str(message.content).split()) for message in messages)

        def remaining_tokens(self, messages: Sequence[LLMMessage], **_: Any) -> int:
            return 100_000 - self.count_tokens(messages)

        @property
        def capabilities(self) -> Any:
            return self.model_info

        @property
        def model_info(self) -> ModelInfo:
            return ModelInfo(
                vision=False,
                function_calling=True,
                json_output=False,
                structured_output=False,
                family=ModelFamily.UNKNOWN,
                multiple_system_messages=False,
            )

    return Watched()


async def go_on(_: int) -> None:
    """Interrupt nothing."""


# ---- The parts, each a process ---------------------------------------------------------------------------------------


async def plain_first(graph: Graph, model: ModelChoice, folder: Path) -> None:
    """AutoGen's own way, until the interruption: the state is saved there."""
    from autogen_agentchat.base import TaskResult
    from autogen_agentchat.conditions import ExternalTermination
    from autogen_agentchat.messages import BaseChatMessage

    async def save_and_die(_: int) -> None:
        (folder / "state.json").write_text(json.dumps(await team.save_state()), encoding="utf-8")
        kill_this_process()

    def client(agent: str) -> ChatCompletionClient:
        async def before_reply(number: int) -> None:
            if graph is IN_A_ROW and (agent, number) == (graph.at_agent, graph.at_reply):
                await save_and_die(number)

        return watched_client(agent, model, folder / PLAIN, before_reply)

    team = graph.team(client)
    stop = ExternalTermination()
    if team._termination_condition is not None:
        team._termination_condition = team._termination_condition | stop
    result: TaskResult | None = None
    async for item in team.run_stream(task=TASK):
        if isinstance(item, TaskResult):
            result = item
        elif isinstance(item, BaseChatMessage) and item.source == "reviewer" and graph is CYCLIC:
            stop.set()
    (folder / "state.json").write_text(json.dumps(await team.save_state()), encoding="utf-8")
    report({"stop_reason": result.stop_reason if result else None})


async def plain_resume(graph: Graph, model: ModelChoice, folder: Path) -> None:
    """AutoGen's own way, afterwards: a new team, load_state, run."""
    team = graph.team(lambda agent: watched_client(agent, model, folder / PLAIN, go_on))
    await team.load_state(json.loads((folder / "state.json").read_text(encoding="utf-8")))
    try:
        result = await asyncio.wait_for(team.run(), RESUME_TIMEOUT)
    except Exception as error:  # noqa: BLE001 - whatever AutoGen answers is what is shown
        report({"error": f"{type(error).__name__}: {error}"})
        return
    spoke = [message.source for message in result.messages if message.source in graph.agents]
    report({"stop_reason": result.stop_reason, "spoke": spoke})


async def durable(graph: Graph, model: ModelChoice, folder: Path, session: str, nexum: str, *, dies: bool) -> None:
    """The same team as a durable run; with `dies` it is killed at the same place."""
    from durable_autogen import run_durable

    def client(agent: str) -> ChatCompletionClient:
        async def before_reply(number: int) -> None:
            if dies and (agent, number) == (graph.at_agent, graph.at_reply):
                kill_this_process()

        return watched_client(agent, model, folder / DURABLE, before_reply)

    result = await run_durable(lambda: graph.team(client), task=TASK, session_id=session, nexum=nexum)
    report(
        {"stop_reason": result.stop_reason, "spoke": [m.source for m in result.messages if m.source in graph.agents]}
    )


def report(what: Mapping[str, Any]) -> None:
    """For the process that shows it."""
    print(f"REPORT {json.dumps(what)}", flush=True)


# ---- The show --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A process that has ended."""

    pid: int
    code: int
    report: Mapping[str, Any]
    asked: tuple[str, ...]
    """Which agents called a model in it, in order."""


class Stage:
    """Runs the parts of one show."""

    def __init__(self, graph: Graph, *, offline: bool, folder: Path) -> None:
        self.graph, self._offline, self.folder = graph, offline, folder

    async def part(self, half: str, name: str, *arguments: str) -> Part:
        """One process, to its end; its own lines are passed on."""
        command = [HERE, "--part", name, "--folder", str(self.folder), *arguments]
        command += ["--cyclic"] if self.graph is CYCLIC else []
        command += ["--offline"] if self._offline else []
        child = await start_child(command, quiet=False)
        found: dict[str, Any] = {}

        async def read() -> None:
            assert child.process.stdout is not None
            async for raw in child.process.stdout:
                line = raw.decode("utf-8", "replace").rstrip()
                if line.startswith("REPORT "):
                    found.update(json.loads(line.removeprefix("REPORT ")))
                elif line:
                    say(f"    {line}")

        try:
            await asyncio.wait_for(read(), PART_TIMEOUT)
            code = await child.process.wait()
        finally:
            await child.end()
        log = self.folder / half
        calls = [line.split(" ", 1) for line in (log.read_text("utf-8").splitlines() if log.exists() else [])]
        asked = tuple(agent for pid, agent in calls if pid == str(child.process.pid))
        return Part(child.process.pid, code, found, asked)


async def compare(*, cyclic: bool, model: ModelChoice, nexum: str | None) -> int:
    """Both halves; the exit code is 0 if the durable one holds what it promises."""
    let_ctrl_c_cancel()
    graph = CYCLIC if cyclic else IN_A_ROW
    say(f"[demo] AutoGen {version('autogen-agentchat')} as it is installed")
    say(f"[demo] {graph.name} of four agents ({', '.join(graph.agents)}), interrupted {graph.how}")
    with tempfile.TemporaryDirectory(prefix="graphflow-") as name:
        stage = Stage(graph, offline=model.offline, folder=Path(name))
        await show_plain(stage)
        return await show_durable(stage, nexum)


async def show_plain(stage: Stage) -> bool:
    """AutoGen's own half; whether it resumed."""
    graph = stage.graph
    say("\n=== AutoGen alone: save_state, load_state ===")
    first = await stage.part(PLAIN, "plain-first")
    say(f"[plain] process {first.pid}: {asked(first)}; {ended(first)}")
    if not (stage.folder / "state.json").exists():
        say("[plain] the state was not saved, so there is nothing to resume")
        return False
    say("[plain] its state is saved; a new process loads it and runs the team")
    second = await stage.part(PLAIN, "plain-resume")
    answer = second.report.get("error") or second.report.get("stop_reason")
    say(f"[plain] process {second.pid}: {asked(second)}; {ended(second)}")
    say(f"[plain] AutoGen answers: {answer!r}")
    cut_off = {graph.at_agent} if first.code else set()
    had_a_say = (set(first.asked) - cut_off) | set(second.report.get("spoke", ()))
    never = [agent for agent in graph.agents if agent not in had_a_say]
    if never:
        say(f"[plain] it did not resume: {', '.join(never)} never had a say, and the run counts as over")
    else:
        say(f"[plain] it resumed: after loading, {', '.join(second.report['spoke'])} spoke")
    return not never


async def show_durable(stage: Stage, nexum: str | None) -> int:
    """The durable half, and what is wrong with it, if anything is."""
    from durable_autogen.journal import Kind, read_events

    graph = stage.graph
    session = f"graphflow-{secrets.token_hex(4)}"
    say("\n=== The same as a durable run: killed there, and run again ===")
    async with NexumForRun(nexum, workers=()) as server, NexumClient(server.address) as client:

        async def replies() -> list[Event]:
            return [event for event in (await read_events(client, session))[0] if event.kind is Kind.REPLY]

        where = ("--session", session, "--nexum", server.address)
        first = await stage.part(DURABLE, "durable-first", *where)
        before = await replies()
        say(f"[durable] process {first.pid}: {asked(first)}; {ended(first)}")
        say(f"[durable] recorded by then: {', '.join(str(event) for event in before) or 'nothing'}")
        begun = time.monotonic()
        second = await stage.part(DURABLE, "durable-again", *where)
        say(f"[durable] process {second.pid}: {asked(second)}; {ended(second)}, {time.monotonic() - begun:.1f} s")
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
        wrong.append(f"{', '.join(missing)} never had a say")
    for reason in wrong:
        complain(f"error: {reason}")
    if not wrong:
        say(
            f"[durable] it finished: {', '.join(second.report['spoke'])} spoke, in this order. {len(before)} recorded "
            f"call(s) were replayed, none was repeated; {len(second.asked)} were made live "
            f"(session {session})"
        )
    return 1 if wrong else 0


def asked(part: Part) -> str:
    """For a person."""
    if not part.asked:
        return "no agent called its model"
    return f"model calls by {', '.join(part.asked)}"


def ended(part: Part) -> str:
    """For a person."""
    if part.code == 0:
        return "ended by itself"
    return f"killed (exit {part.code})" if part.code < 0 or not part.report else f"failed (exit {part.code})"


# ---- Command line ----------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The command line; what isn't in its help is for the parts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cyclic", action="store_true", help="a loop instead of a row")
    parser.add_argument("--offline", action="store_true", help="rehearse without a model key")
    parser.add_argument("--nexum", metavar="HOST:PORT", default=os.environ.get("NEXUM_ADDRESS") or None)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--session", help=argparse.SUPPRESS)
    parser.add_argument("--until-stdin-closes", action="store_true", help=argparse.SUPPRESS)
    return parser


def end_with_parent() -> None:
    """This process ends when standard input closes."""

    def wait() -> None:
        with suppress(OSError):
            while os.read(0, 1024):  # not sys.stdin, whose lock would be held at the interpreter's end
                pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


async def run_part(args: argparse.Namespace) -> None:
    """One of the processes of a show."""
    graph = CYCLIC if args.cyclic else IN_A_ROW
    model = choose_model(os.environ, offline=args.offline)
    if args.part == "plain-first":
        await plain_first(graph, model, args.folder)
    elif args.part == "plain-resume":
        await plain_resume(graph, model, args.folder)
    else:
        dies = args.part == "durable-first"
        await durable(graph, model, args.folder, args.session, args.nexum, dies=dies)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit code."""
    args = build_parser().parse_args(argv)
    try:
        if args.part:
            end_with_parent()
            asyncio.run(run_part(args))
            return 0
        model = choose_model(os.environ, offline=args.offline)
        say(f"[demo] Model: {model.description}")
        return asyncio.run(compare(cyclic=args.cyclic, model=model, nexum=args.nexum))
    except (ModelChoiceError, NexumError) as error:
        complain(f"error: {error}")
        return 2
    except (KeyboardInterrupt, asyncio.CancelledError):
        complain("\ninterrupted; nothing of it is left running")
        return 130


if __name__ == "__main__":
    accept_any_character()
    sys.exit(main())
