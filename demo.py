"""An AutoGen agent whose run survives a crash: model replies and tool results are recorded before the agent sees them.

Needs nothing else running: without a Nexum server it starts one, with a worker, for the run. Without a model key it
answers offline, by rules, from pages of this project's own.

    python demo.py "What is the population of Tokyo vs New York?"
    python demo.py --crash-after-step 1 "What is the population of Tokyo vs New York?"
    python demo.py "What is the population of Tokyo vs New York?"      # continues as the same run
    python demo.py --team "What is the population of Tokyo vs New York?"
"""

from __future__ import annotations

from support.console import begin_script

begin_script(__name__)  # before the slow imports

import argparse
import asyncio
import hashlib
import logging
import os
import secrets
import sys
import time
from collections import Counter
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from nexum_engine.errors import InvalidRequest, NexumError
from nexum_engine.report import age
from submit_task import Origin, Session
from support.console import (
    argument_text,
    complain,
    let_ctrl_c_cancel,
    log_to,
    run_script,
    say,
    say_or_stop,
    say_what_is_logged,
)
from support.conversation import Conversation
from support.launcher import NexumForRun, kill_this_process
from support.models import ModelChoice, ModelChoiceError, ModelFailed, choose_model
from support.session_file import SessionFile, check_session_id
from workflow import OFFLINE_TOOL_CALL, TOOL_CALL

if TYPE_CHECKING:
    from autogen_agentchat.agents import AssistantAgent
    from autogen_agentchat.base import Team
    from autogen_core.tools import FunctionTool

QUESTION = "What is the population of Tokyo vs New York?"
OFFLINE_NOTE = ": rules instead of a model, and this project's own pages instead of the web"
MAX_TOOL_ROUNDS = 12
SYSTEM_MESSAGE = (
    "You are a careful research assistant. Search with web_search, read the promising pages with visit_webpage, and "
    "only then answer, in prose, from what you read. End with a list of your sources, each with its URL."
)
AGENT, WRITER = "research_assistant", "writer"
TEAM_ROLES = {
    "first_researcher": " Another researcher works beside you: take the first half of what the question needs.",
    "second_researcher": " Another researcher works beside you: take the second half of what the question needs.",
}
WRITER_MESSAGE = (
    "Two researchers have reported. Answer the user's question, in prose, from their reports alone. End with the list "
    "of the sources that you used, each with its URL."
)


class DurableCalls:
    """The tools of one run: each call is submitted to Nexum, and a worker executes it.

    `crash_after` kills this process once it has executed so many calls.
    """

    def __init__(self, session: Session, crash_after: int | None) -> None:
        self.session, self.crash_after = session, crash_after
        self.count: Counter[Origin] = Counter()

    async def call(self, tool_name: str, **arguments: Any) -> str:
        """Submit one call (submit_task.py); return its recorded result."""
        from durable_autogen import call_id

        # Two calls with equal arguments within one run have two ids, so both are executed; a re-run has the same ids.
        result = await self.session.call(tool_name, arguments, timeout=300, scope=call_id())
        self.count[result.origin] += 1
        if result.origin is Origin.EXECUTED and self.count[Origin.EXECUTED] == self.crash_after:
            say(f"[demo] step {self.crash_after} is recorded; crashing now, as requested (run again to continue)")
            kill_this_process()
        return result.text

    def tools(self) -> list[FunctionTool]:
        """Wrap plain functions as AutoGen's tools."""
        from autogen_core.tools import FunctionTool

        from support.tools import TOOLS

        async def web_search(query: str, max_results: int = 5) -> str:
            return await self.call("web_search", query=query, max_results=max_results)

        async def visit_webpage(url: str) -> str:
            return await self.call("visit_webpage", url=url)

        return [FunctionTool(one, TOOLS[one.__name__].description) for one in (web_search, visit_webpage)]


def build_agent(model: ModelChoice, calls: DurableCalls) -> AssistantAgent:
    """Build an ordinary AssistantAgent. Only its tools run elsewhere."""
    return _researcher(AGENT, SYSTEM_MESSAGE, model, (1, 1), calls, stream=model.streams)


def build_team(model: ModelChoice, calls: DurableCalls) -> Team:
    """Build a team of two researchers who work at the same time, and a writer after them."""
    from autogen_agentchat.agents import AssistantAgent
    from autogen_agentchat.teams import DiGraphBuilder, GraphFlow

    researchers = [
        _researcher(name, SYSTEM_MESSAGE + role, model, (number, len(TEAM_ROLES)), calls)
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
    calls: DurableCalls,
    stream: bool = False,
) -> AssistantAgent:
    from autogen_agentchat.agents import AssistantAgent

    return AssistantAgent(
        name,
        model.client(share=share),
        tools=[*calls.tools()],
        system_message=system_message,
        max_tool_iterations=MAX_TOOL_ROUNDS,  # the default of one would end in raw tool output instead of an answer
        model_client_stream=stream,
    )


async def run(question: str | None, model: ModelChoice, session_id: str, args: argparse.Namespace) -> int:
    """Ask the question in the session, or continue with the session's own; return the exit code."""
    let_ctrl_c_cancel()
    announce_session(session_id)
    conversation = Conversation(WRITER if args.team else AGENT, short_names={AGENT: "agent"})
    async with NexumForRun(args.nexum, meanwhile=partial(import_module, "durable_autogen")) as nexum:
        from durable_autogen import run_durable_stream

        if args.fork or question is None:
            question = await recorded_question(session_id, question or "", args.fork, nexum.address)
        workflow = OFFLINE_TOOL_CALL if model.offline else TOOL_CALL
        async with Session(session_id, nexum=nexum.address, workflow=workflow, tell=say_or_stop) as session:
            await session.file.create()
            calls = DurableCalls(session, args.crash_after_step)
            build = build_team if args.team else build_agent
            items = run_durable_stream(
                lambda: build(model, calls),
                task=question,
                session_id=session_id,
                nexum=nexum.address,
                on_drift=args.on_drift,
            )
            await conversation.show(items)
    executed, attached = calls.count[Origin.EXECUTED], calls.count[Origin.ATTACHED]
    cached = conversation.results - executed - attached
    failed = f", {conversation.failed} failed" if conversation.failed else ""
    say(f"\n[demo] Tool calls: {executed} executed, {cached} cached, {attached} attached{failed} (nexum ps)")
    if args.crash_after_step is not None:
        say(f"[demo] No crash: the run executed {executed} call(s) of its own, not {args.crash_after_step}")
    if not conversation.answered:
        complain(
            f"error: no answer: the model's last reply was empty, or it asked for {MAX_TOOL_ROUNDS} rounds of tools"
        )
    return 0 if conversation.answered else 1


def announce_session(session_id: str) -> None:
    """Say whether the session is new or continues."""
    record = SessionFile(session_id).load()
    if record is None:
        say(f"[demo] Session: {session_id} (new; continue it with --session-id {session_id})")
    else:
        begun = age(round((time.time() - record.created_at) * 1000))
        say(f"[demo] Session: {session_id}, begun {begun}: continuing it (--new-session starts afresh)")


async def recorded_question(session_id: str, question: str, fork_of: str | None, nexum: str) -> str:
    """Fork the session first, if requested; return its own question, or this file's if it has none."""
    from durable_autogen import fork_session, fork_source, question_of
    from nexum_engine.client import NexumClient

    async with NexumClient(nexum) as client:
        if fork_of:
            source, count = fork_source(fork_of)
            await fork_session(client, source, count, session_id, question)
            said = f"; the user says: {question}" if question else ""
            say(f"[demo] Forked from the first {count} event(s) of {source}{said}")
        recorded = await question_of(client, session_id)
    why = "Forked" if question else "No question given"
    say(f"[demo] {why}; asking {'this demo' if recorded is None else 'the session'}'s own: {recorded or QUESTION}")
    return recorded or QUESTION


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="Models: GEMINI_API_KEY, OPENAI_API_KEY or ANTHROPIC_API_KEY picks the vendor, NEXUM_MODEL the model; "
        "OPENAI_BASE_URL with NEXUM_MODEL is any OpenAI-compatible server. Without a key the demo answers offline.",
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
        help="if the session has recorded another question, model or program: stop, or continue live from there",
    )
    parser.add_argument("--sessions", action="store_true", help="list the sessions (python -m durable_autogen ls)")
    parser.add_argument(
        "--fork",
        metavar="SESSION@N",
        help="begin --session-id with the first N events of SESSION (python -m durable_autogen show SESSION); "
        "a question is what the user says there",
    )
    parser.add_argument("--offline", action="store_true", help="answer without a model key and without the web")
    parser.add_argument(
        "--nexum",
        metavar="HOST:PORT",
        default=os.environ.get("NEXUM_ADDRESS") or None,
        help="address of a running server (default: $NEXUM_ADDRESS, else the server of this folder's database, else "
        "localhost:50051, else an embedded one)",
    )
    return parser


def session_id_for(question: str, model: ModelChoice, args: argparse.Namespace) -> str:
    """Return the session id: the given one, a new one, or the one that question, mode and model always have."""
    if args.session_id is not None:
        return check_session_id(args.session_id)
    if args.new_session:
        return secrets.token_hex(6)
    kind = "\nteam" if args.team else ""
    return hashlib.sha256(f"{question}\n{model.slug}{kind}".encode()).hexdigest()[:12]


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code: 0 answered, 1 failed, 2 can't run as requested."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.crash_after_step is not None and args.crash_after_step < 1:
        parser.error(f"--crash-after-step is {args.crash_after_step}: give 1 or more")
    question = argument_text(QUESTION if args.question is None else args.question).strip()
    if not question:
        parser.error("the question is empty")
    if args.fork and not args.session_id:
        parser.error("--fork needs the new session's name in --session-id")
    given = (args.question, args.session_id, args.new_session, args.team, args.fork, args.crash_after_step)
    if args.sessions and any(given):
        parser.error("--sessions lists what is on record: it takes no question and no other option but --nexum")
    try:
        if args.sessions:
            from durable_autogen.__main__ import main as durable_autogen

            return durable_autogen(["ls", *(["--nexum", args.nexum] if args.nexum else [])])
        model = choose_model(os.environ, offline=args.offline)
        say(f"[demo] Model: {model.description}{OFFLINE_NOTE if model.offline else ''}")
        is_named = args.question is None and args.session_id is not None  # such a session may have a question
        if args.question is None and not is_named:
            say(f"[demo] No question given; asking this demo's own: {question}")
        asked = None if is_named else question
        return asyncio.run(run(asked, model, session_id_for(question, model, args), args))
    except (ModelChoiceError, InvalidRequest, NexumError) as error:
        complain(f"error: {error}")
        return 2
    except ModelFailed as error:
        complain(f"error: {error}; the same command continues from what is recorded")
        return 1


if __name__ == "__main__":
    log_to(sys.stderr, logging.WARNING)
    say_what_is_logged("durable_autogen", "nexum_engine")
    run_script(main, interrupted="the same command continues from what is recorded")
