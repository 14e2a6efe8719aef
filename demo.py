"""Run an AutoGen agent that survives crashes: model replies and tool results are recorded before the agent sees them.

If no Nexum server answers, the demo opens the database itself, and starts a worker for the run. Without a model key it
answers offline: by rules, from pages of this project.

    python demo.py "What is the population of Tokyo vs New York?"
    python demo.py --crash-after-step 1 "What is the population of Tokyo vs New York?"
    python demo.py "What is the population of Tokyo vs New York?"      # continues where it stopped
    python demo.py --team "What is the population of Tokyo vs New York?"
    python demo.py --ask "What is the population of Tokyo vs New York?"      # asks before it reads a page
"""

from __future__ import annotations

from support.console import begin_script

begin_script(__name__)  # first, so that Ctrl+C during the slow imports prints no traceback

import argparse
import asyncio
import logging
import os
import secrets
import sys
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

from nexum_engine.embedded import EmbeddedNexum
from nexum_engine.errors import InvalidRequest, NexumError
from submit_task import Origin, Session
from support.console import (
    argument_text,
    complain,
    let_ctrl_c_cancel,
    log_to,
    quick_imports,
    run_script,
    say,
    say_after_ctrl_c,
    say_or_stop,
    say_what_is_logged,
)
from support.conversation import Conversation
from support.demo_options import build_parser
from support.demo_session import announce_session, count_only_model_calls, derived_session_id, recorded_question
from support.models import OFFLINE_NOTE, ModelChoice, ModelChoiceError, ModelFailed, choose_model
from support.processes import ROOT, kill_this_process, say_what_is_lost
from support.session_file import check_session_id
from support.team import WRITER, build_team
from workflow import OFFLINE_TOOL_CALL, TOOL_CALL

if TYPE_CHECKING:
    from autogen_agentchat.agents import AssistantAgent
    from autogen_agentchat.base import Team
    from autogen_core.tools import FunctionTool

QUESTION = "What is the population of Tokyo vs New York?"
MAX_TOOL_ROUNDS = 12
SYSTEM_MESSAGE = (
    "You are a careful research assistant. Search with web_search, read the promising pages with visit_webpage, and "
    "only then answer, in prose, from what you read. End with a list of your sources, each with its URL."
)
AGENT = "research_assistant"


class DurableCalls:
    """The tools of one run. Each tool call is submitted to Nexum, and a worker executes the call.

    `crash_after` is the number of executed calls after which this process kills itself.
    """

    def __init__(self, session: Session, crash_after: int | None) -> None:
        self.session, self.crash_after = session, crash_after
        self.count: Counter[Origin] = Counter()

    async def call(self, tool_name: str, **arguments: Any) -> str:
        """Submit one tool call through submit_task.py; return its recorded result."""
        from durable_autogen import call_id

        # Pass the call's id as scope, so that two calls with equal arguments are both executed. If the run is repeated,
        # each call gets the id that it had in the first run.
        result = await self.session.call(tool_name, arguments, timeout=300, scope=call_id())
        self.count[result.origin] += 1
        if result.origin is Origin.EXECUTED and self.count[Origin.EXECUTED] == self.crash_after:
            how = f"(continue with --session-id {self.session.session_id})"
            say(f"[demo] step {self.crash_after} is recorded; crashing now, as requested {how}")
            kill_this_process()
        return result.text

    def tools(self) -> list[FunctionTool]:
        """Return AutoGen FunctionTools. Each calls a plain function that submits a tool call."""
        from autogen_core.tools import FunctionTool

        from support.tools import TOOLS

        async def web_search(query: str, max_results: int | None = None) -> str:
            return await self.call("web_search", query=query, max_results=max_results)

        async def visit_webpage(url: str) -> str:
            return await self.call("visit_webpage", url=url)

        return [FunctionTool(one, TOOLS[one.__name__].description) for one in (web_search, visit_webpage)]


def build_agent(
    model: ModelChoice,
    calls: DurableCalls,
    name: str = AGENT,
    role: str = "",
    share: tuple[int, int] = (1, 1),
    *,
    stream: bool = False,
) -> AssistantAgent:
    """Build an ordinary AssistantAgent. Only its tool calls run in another process."""
    from autogen_agentchat.agents import AssistantAgent

    return AssistantAgent(
        name,
        model.client(share=share),
        tools=[*calls.tools()],
        system_message=SYSTEM_MESSAGE + role,
        max_tool_iterations=MAX_TOOL_ROUNDS,  # with AutoGen's default of 1, raw tool output would be the answer
        model_client_stream=stream,
    )


async def run(question: str | None, model: ModelChoice, session_id: str, args: argparse.Namespace) -> int:
    """Ask the question in the session. If `question` is None, ask the question that the session has recorded.

    Return the exit code: 0 if there is an answer, else 1.
    """
    let_ctrl_c_cancel()
    announce_session(session_id)
    conversation = Conversation(WRITER if args.team else AGENT)
    async with EmbeddedNexum(args.nexum, workers=[ROOT / "worker.py"], owners=bool(args.fork or args.ask)) as nexum:
        with quick_imports():  # imported here, because it takes a second, and the worker starts meanwhile
            from durable_autogen import Budget, Policy, run_durable_stream

        if nexum.is_published:
            if args.budget is not None:
                raise InvalidRequest("--budget counts recorded calls, and this server records no runs: leave it out")
            say_what_is_lost(
                nexum.address,
                "it records the tool calls, but not the run, and shows no attempts, times or reasons of failures. A "
                "re-run asks the model again. To record runs, use this project's own server: python -m nexum_engine",
            )
            question = question or QUESTION
        elif args.fork or question is None:
            question = await recorded_question(session_id, question or "", args.fork, nexum.address, default=QUESTION)
        workflow = OFFLINE_TOOL_CALL if model.offline else TOOL_CALL
        async with Session(session_id, nexum=nexum.address, workflow=workflow, tell=say_or_stop) as session:
            await session.file.create()
            calls = DurableCalls(session, args.crash_after_step)

            def build() -> AssistantAgent | Team:
                if args.team:
                    return build_team(model, partial(build_agent, model, calls))
                return build_agent(model, calls, stream=model.streams)

            if nexum.is_published:
                items = build().run_stream(task=question)
            else:
                items = run_durable_stream(
                    build,
                    task=question,
                    session_id=session_id,
                    nexum=nexum.address,
                    on_drift=args.on_drift,
                    policies={"visit_webpage": Policy(approval="always")} if args.ask else None,
                    approve=args.ask,
                    budget=None if args.budget is None else Budget(usd=args.budget),
                )
            await conversation.show(items)
    executed, attached = calls.count[Origin.EXECUTED], calls.count[Origin.ATTACHED]
    cached = conversation.results - executed - attached
    failed = f", {conversation.failed} failed" if conversation.failed else ""
    counts = f"{executed} executed, {cached} cached, {attached} attached{failed}"
    say(f"[demo] Tool calls: {counts} (python -m nexum_engine ps)")
    if args.crash_after_step is not None:
        say(f"[demo] No crash: this run executed {executed} tool call(s), not {args.crash_after_step}")
    if not conversation.answered:
        why = f"the model's last reply was empty, or it used all {MAX_TOOL_ROUNDS} rounds of tool calls"
        complain(f"error: no answer: {why}")
    return 0 if conversation.answered else 1


def main(argv: list[str] | None = None) -> int:
    """Run the demo from the command line. Return its exit code: 0 answered, 1 failed, 2 could not run."""
    parser = build_parser((__doc__ or "").partition("\n")[0], QUESTION)
    args = parser.parse_args(argv)
    question = argument_text(QUESTION if args.question is None else args.question).strip()
    if not question:
        parser.error("the question is empty")
    if args.fork and not args.session_id:
        parser.error("--fork needs the new session's name in --session-id")
    alone = {**vars(parser.parse_args(["--sessions"])), "nexum": args.nexum, "offline": args.offline}
    if args.sessions and vars(args) != alone:
        parser.error("--sessions only lists the sessions: give no question, and no other option but --nexum")
    continues = "the same command continues from what is recorded"
    try:
        if args.sessions:
            from durable_autogen.__main__ import main as durable_autogen

            return durable_autogen(["ls", *(["--nexum", args.nexum] if args.nexum else [])])
        model = choose_model(os.environ, offline=args.offline)
        say(f"[demo] Model: {model.description}{OFFLINE_NOTE if model.offline else ''}")
        if args.session_id is not None:
            session_id = check_session_id(args.session_id)
        elif args.new_session:
            session_id = secrets.token_hex(6)
            continues = f"--session-id {session_id} instead of --new-session continues from what is recorded"
        else:
            session_id = derived_session_id(question, model, team=args.team)
        may_be_recorded = args.question is None and args.session_id is not None
        if args.question is None and not may_be_recorded:
            say(f"[demo] No question given; asking this demo's own: {question}")
        say_after_ctrl_c(continues)
        return asyncio.run(run(None if may_be_recorded else question, model, session_id, args))
    except (ModelChoiceError, InvalidRequest, NexumError) as error:
        complain(f"error: {error}")
        return 2
    except ModelFailed as error:
        complain(f"error: {error}; {continues}")
        return 1


if __name__ == "__main__":
    log_to(sys.stderr, logging.WARNING)
    say_what_is_logged("durable_autogen", "nexum_engine")
    logging.getLogger("durable_autogen").addFilter(count_only_model_calls)
    run_script(main)
