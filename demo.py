"""An AutoGen agent whose run survives a crash: model replies and tool results are recorded before the agent sees them.

Needs nothing else running: without a Nexum server on localhost:50051 it starts one, with a worker, for the run. Without
a model key it rehearses offline.

    python demo.py "What is the population of Tokyo vs New York?"
    python demo.py --crash-after-step 1 "What is the population of Tokyo vs New York?"
    python demo.py "What is the population of Tokyo vs New York?"      # goes on as the same run
    python demo.py --team "What is the population of Tokyo vs New York?"
    python demo.py --sessions
    python demo.py --fork SESSION@2 --session-id other "And which is older?"
"""

from __future__ import annotations

from support.console import begin_script

begin_script(__name__)  # before the slow imports

import argparse
import asyncio
import hashlib
import logging
import os
import re
import secrets
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING

from nexum_engine.client import NexumClient
from nexum_engine.errors import InvalidRequest, NexumError
from nexum_engine.report import age
from submit_task import Origin, Session, ToolResult
from support.console import argument_text, complain, let_ctrl_c_cancel, log_to, run_script, say
from support.launcher import NexumForRun, kill_this_process
from support.models import ModelChoice, ModelChoiceError, ModelFailed, choose_model
from support.session_file import SessionFile, check_session_id
from workflow import OFFLINE_TOOL_CALL, TOOL_CALL

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from autogen_agentchat.agents import AssistantAgent
    from autogen_agentchat.teams import GraphFlow

    from durable_autogen.autogen.transcript import Item

QUESTION = "What is the population of Tokyo vs New York?"
OFFLINE_NOTE = ": rules instead of a model, and this project's own pages instead of the web"
MAX_TOOL_ROUNDS = 12
SYSTEM_MESSAGE = (
    "You are a careful research assistant. Search with web_search, read the promising pages with visit_webpage, and "
    "only then answer, in prose, from what you read. End with a list of your sources, each with its URL."
)

RESEARCHER = "research_assistant"
WRITER = "writer"
TEAM_ROLES = {
    "first_researcher": " Another researcher works beside you: take the first half of what the question needs.",
    "second_researcher": " Another researcher works beside you: take the second half of what the question needs.",
}
WRITER_MESSAGE = (
    "Two researchers have reported. Answer the user's question, in prose, from their reports alone. End with the list "
    "of the sources that you used, each with its URL."
)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="Models: GEMINI_API_KEY, OPENAI_API_KEY or ANTHROPIC_API_KEY picks the vendor, NEXUM_MODEL the model; "
        "OPENAI_BASE_URL with NEXUM_MODEL is any OpenAI-compatible server. Without a key the demo rehearses offline.",
    )
    parser.add_argument("question", nargs="?", help=f"default: {QUESTION}")
    parser.add_argument("--team", action="store_true", help="ask two researchers at once, and a writer after them")
    session = parser.add_mutually_exclusive_group()
    session.add_argument(
        "--session-id", metavar="ID", help="continue or begin this session (default: from the question)"
    )
    session.add_argument("--new-session", action="store_true", help="begin afresh, with a session id of its own")
    parser.add_argument(
        "--crash-after-step", type=int, metavar="N", help="kill this process once N tool calls that it started are done"
    )
    parser.add_argument(
        "--on-drift",
        choices=("stop", "continue"),
        default="stop",
        help="if the session has recorded another question, model or program: stop, or go on live from there",
    )
    parser.add_argument("--sessions", action="store_true", help="list the sessions on record")
    parser.add_argument(
        "--fork",
        metavar="SESSION@N",
        help="begin --session-id with the first N recorded events of SESSION; a question is what the user says there",
    )
    parser.add_argument("--offline", action="store_true", help="rehearse without a model key and without the web")
    parser.add_argument(
        "--nexum",
        metavar="HOST:PORT",
        default=os.environ.get("NEXUM_ADDRESS") or None,
        help="a server that has to be running (default: $NEXUM_ADDRESS, else localhost:50051, else an embedded one)",
    )
    return parser


class Steps:
    """Counts results by where they came from, and failures; crashes the process at the N-th result that it executed
    itself."""

    def __init__(self, crash_after: int | None) -> None:
        self.crash_after = crash_after
        self.count: Counter[Origin] = Counter()
        self.failed = 0

    def __call__(self, result: ToolResult) -> None:
        self.count[result.origin] += 1
        if result.origin is Origin.EXECUTED and self.count[Origin.EXECUTED] == self.crash_after:
            say(f"[demo] step {self.crash_after} is recorded; crashing now, as asked (run again to continue)")
            kill_this_process()


def session_id_for(question: str, model: ModelChoice, args: argparse.Namespace) -> str:
    """The session of this run: the given one, a new one, or the one that question, mode and model always have."""
    if args.session_id is not None:
        return check_session_id(args.session_id)
    if args.new_session:
        return secrets.token_hex(6)
    kind = "\nteam" if args.team else ""
    return hashlib.sha256(f"{question}\n{model.slug}{kind}".encode()).hexdigest()[:12]


def announce_session(session_id: str) -> None:
    """Say whether the session is new or goes on."""
    record = SessionFile(session_id).load()
    if record is None:
        say(f"[demo] Session: {session_id} (new; continue it with --session-id {session_id})")
    else:
        begun = age(round((time.time() - record.created_at) * 1000))
        say(f"[demo] Session: {session_id}, begun {begun}: continuing it (--new-session starts afresh)")


def build_agent(model: ModelChoice, session: Session, steps: Steps) -> AssistantAgent:
    """The agent: an ordinary AssistantAgent, only its tools run in a worker."""
    return _researcher(RESEARCHER, SYSTEM_MESSAGE, model, (1, 1), session, steps, stream=model.streams)


def build_team(model: ModelChoice, session: Session, steps: Steps) -> GraphFlow:
    """Two researchers at the same time, then a writer."""
    from autogen_agentchat.agents import AssistantAgent
    from autogen_agentchat.teams import DiGraphBuilder, GraphFlow

    researchers = [
        _researcher(name, SYSTEM_MESSAGE + role, model, (number, len(TEAM_ROLES)), session, steps)
        for number, (name, role) in enumerate(TEAM_ROLES.items(), 1)
    ]
    writer = AssistantAgent(WRITER, model.client(), system_message=WRITER_MESSAGE)
    builder = DiGraphBuilder().add_node(writer)
    for researcher in researchers:
        builder.add_node(researcher).add_edge(researcher, writer)
    return GraphFlow([*researchers, writer], builder.build())


def _researcher(
    name: str,
    system_message: str,
    model: ModelChoice,
    share: tuple[int, int],
    session: Session,
    steps: Steps,
    *,
    stream: bool = False,
) -> AssistantAgent:
    from autogen_agentchat.agents import AssistantAgent

    from durable_autogen import DurableTool
    from support.tools import TOOLS

    return AssistantAgent(
        name=name,
        model_client=model.client(share=share),
        tools=[DurableTool(tool, session, on_result=steps) for tool in TOOLS.values()],
        system_message=system_message,
        # The default of one round would end in raw tool output instead of an answer.
        max_tool_iterations=MAX_TOOL_ROUNDS,
        model_client_stream=stream,
    )


async def show(items: AsyncIterator[Item], answerer: str, steps: Steps) -> bool:
    """Print what the agents do as they do it; whether it ended in an answer."""
    from autogen_agentchat.base import TaskResult
    from autogen_agentchat.messages import (
        ModelClientStreamingChunkEvent,
        TextMessage,
        ToolCallExecutionEvent,
        ToolCallRequestEvent,
    )

    streaming = answered = False
    async for event in items:
        if isinstance(event, TaskResult):
            continue
        if isinstance(event, ModelClientStreamingChunkEvent):
            say(event.content if streaming else f"\n{event.content}", end="")
            streaming = True
            continue
        if streaming:
            say("")
        who = "agent" if event.source == RESEARCHER else event.source
        if isinstance(event, ToolCallRequestEvent):
            for call in event.content:
                say(f"[{who}] calls {call.name} {call.arguments}")
        elif isinstance(event, ToolCallExecutionEvent):
            for result in event.content:
                what = f"an error: {result.content}" if result.is_error else f"{len(result.content):,} characters"
                say(f"[{who}] has from {result.name} {what}")
                steps.failed += bool(result.is_error)
        elif isinstance(event, TextMessage) and event.source == answerer:
            answered = bool(event.content.strip())
            if not streaming:
                say(f"\n{event.content}")
        elif isinstance(event, TextMessage) and event.source in TEAM_ROLES:
            say(f"[{who}] reports:\n{event.content}")
        streaming = False
    return answered


async def run(question: str | None, model: ModelChoice, session_id: str, args: argparse.Namespace) -> int:
    """Ask the question in the session, or go on with the session's own; the exit code."""
    let_ctrl_c_cancel()
    from durable_autogen import run_durable_stream

    announce_session(session_id)
    steps = Steps(args.crash_after_step)
    async with NexumForRun(args.nexum) as nexum:
        if args.fork:
            await fork(args.fork, session_id, question or "", nexum.address)
        if args.fork or question is None:
            question = await own_question(session_id, nexum.address, why="Forked" if question else "No question given")
        session = Session(session_id, nexum=nexum.address, workflow=OFFLINE_TOOL_CALL if model.offline else TOOL_CALL)
        session.file.create()
        build = build_team if args.team else build_agent
        items = run_durable_stream(
            lambda: build(model, session, steps),
            task=question,
            session_id=session_id,
            nexum=nexum.address,
            on_drift=args.on_drift,
        )
        try:
            answered = await show(items, WRITER if args.team else RESEARCHER, steps)
        finally:
            await items.aclose()
            await session.close()
    executed, cached, attached = (steps.count[origin] for origin in (Origin.EXECUTED, Origin.CACHED, Origin.ATTACHED))
    failed = f", {steps.failed} failed" if steps.failed else ""
    counts = f"{executed} executed, {cached} cached, {attached} attached{failed}"
    say(f"\n[demo] Tool calls: {counts} (python -m nexum_engine ps)")
    if args.crash_after_step is not None:
        say(f"[demo] No crash: the run executed {executed} call(s) of its own, not {args.crash_after_step}")
    if not answered:
        complain(
            f"error: no answer: the model's last reply was empty, or it asked for {MAX_TOOL_ROUNDS} rounds of tools"
        )
    return 0 if answered else 1


async def own_question(session_id: str, nexum: str, *, why: str) -> str:
    """The session's question; the README's in a new one."""
    from durable_autogen import question_of

    async with NexumClient(nexum) as client:
        recorded = await question_of(client, session_id)
    whose = "the README's" if recorded is None else "the session's own"
    say(f"[demo] {why}; asking {whose}: {recorded or QUESTION}")
    return recorded or QUESTION


async def fork(place: str, session_id: str, message: str, nexum: str) -> None:
    """Begin the session with the first events of another."""
    from durable_autogen import fork_session

    source, _, count = place.rpartition("@")
    async with NexumClient(nexum) as client:
        await fork_session(client, source, int(count), session_id, message)
    say(f"[demo] Forked from the first {count} event(s) of {source}{f'; the user says: {message}' if message else ''}")


async def show_sessions(nexum_address: str | None) -> int:
    """Print the sessions on record; the exit code."""
    from durable_autogen import list_sessions

    async with NexumForRun(nexum_address, workers=()) as nexum, NexumClient(nexum.address) as client:
        sessions = await list_sessions(client)
    if not sessions:
        say("[demo] no session is on record here")
    for one in sessions:
        calls = f"{one.calls['reply']} model call(s), {one.calls['tool']} tool call(s)"
        begun = age(round(time.time() * 1000) - one.begun_ms)
        say(f"{one.session:<22} {one.status:<12} {calls}, begun {begun}")
        say(f"    {one.question or '(no question)'}")
        say(f"    {', '.join(one.models) or 'no model has answered yet'}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit code: 0 answered, 1 failed, 2 can't run as asked."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.crash_after_step is not None and args.crash_after_step < 1:
        parser.error(f"--crash-after-step is {args.crash_after_step}: give 1 or more")
    question = argument_text(QUESTION if args.question is None else args.question).strip()
    if not question:
        parser.error("the question is empty")
    if args.fork and not (args.session_id and re.fullmatch(r"[\w-]+@\d+", args.fork)):
        parser.error("--fork takes SESSION@N, and the new session's name in --session-id")
    asked = (args.question, args.session_id, args.new_session, args.team, args.fork, args.crash_after_step)
    if args.sessions and any(asked):
        parser.error("--sessions lists what is on record: it takes no question and no other option but --nexum")
    try:
        if args.sessions:
            return asyncio.run(show_sessions(args.nexum))
        model = choose_model(os.environ, offline=args.offline)
        say(f"[demo] Model: {model.description}{OFFLINE_NOTE if model.offline else ''}")
        said: str | None = question
        if args.question is None and args.session_id is None:
            say(f"[demo] No question given; asking the README's: {question}")
        elif args.question is None:
            said = None  # the session may have one
        return asyncio.run(run(said, model, session_id_for(question, model, args), args))
    except (ModelChoiceError, InvalidRequest, NexumError) as error:
        complain(f"error: {error}")
        return 2
    except ModelFailed as error:
        complain(f"error: {error}; the same command continues from what is recorded")
        return 1


if __name__ == "__main__":
    log_to(sys.stderr, logging.WARNING)
    run_script(main, interrupted="the same command continues from what is recorded")
