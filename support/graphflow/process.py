"""Run one process of the GraphFlow comparison: a team before its interruption, or after it.

    python -m support.graphflow.process plain-first --folder FOLDER
    python -m support.graphflow.process plain-resume --folder FOLDER
    python -m support.graphflow.process durable-first --folder FOLDER --session ID --nexum HOST:PORT
    python -m support.graphflow.process durable-again --folder FOLDER --session ID --nexum HOST:PORT

FOLDER keeps the saved state, and each process's log of its model calls. A process whose team has finished prints the
result after `REPORT `.
"""

from __future__ import annotations

from support.console import begin_script

begin_script(__name__)  # first, so that Ctrl+C during the slow imports prints no traceback

import argparse
import asyncio
import json
import logging
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING

from nexum_engine.signals import when_stdin_closes
from support.console import log_to, run_script, say, say_what_is_logged
from support.graphflow.graphs import CYCLIC, IN_A_ROW, TASK, Graph
from support.models import ModelChoice, choose_model
from support.options import add_until_stdin_closes_option
from support.processes import kill_this_process

if TYPE_CHECKING:
    from autogen_agentchat.base import TaskResult
    from autogen_core.models import ChatCompletionClient

STATE = "state.json"
REPORT = "REPORT "
RESUME_TIMEOUT = 60.0  # seconds for a resumed team


async def plain_first(graph: Graph, model: ModelChoice, folder: Path) -> None:
    """Run the team in AutoGen until the interruption, and save the team's state at that point."""
    from autogen_agentchat.conditions import ExternalTermination
    from autogen_agentchat.messages import BaseChatMessage

    async def save() -> None:
        (folder / STATE).write_text(json.dumps(await team.save_state()), encoding="utf-8")

    async def save_and_die() -> None:
        await save()
        kill_this_process()

    # The chain is interrupted during a reply: this process kills itself. The loop is interrupted between two rounds: a
    # termination condition ends the run.
    dies = save_and_die if graph is IN_A_ROW else None
    stop = ExternalTermination()
    team = graph.team(_clients(graph, model, folder / "plain-first", dies), until=stop)
    async for item in team.run_stream(task=TASK):
        if isinstance(item, BaseChatMessage) and item.source == "reviewer":
            stop.set()
    await save()


async def plain_resume(graph: Graph, model: ModelChoice, folder: Path) -> None:
    """Load the saved state into a new team, and run it."""
    from autogen_agentchat.base import TaskResult

    team = graph.team(_clients(graph, model, folder / "plain-resume"))
    await team.load_state(json.loads((folder / STATE).read_text(encoding="utf-8")))
    try:
        result = await asyncio.wait_for(team.run(), RESUME_TIMEOUT)
    except Exception as error:  # noqa: BLE001 - the comparison shows AutoGen's error
        result = TaskResult(messages=[], stop_reason=f"{type(error).__name__}: {error}")
    _report(graph, result)


async def durable(graph: Graph, model: ModelChoice, log: Path, session: str, nexum: str, *, dies: bool) -> None:
    """Run the team as a durable run. If `dies` is true, kill this process at the graph's point of interruption."""
    from durable_autogen import run_durable

    async def die() -> None:
        kill_this_process()

    clients = _clients(graph, model, log, die if dies else None)
    _report(graph, await run_durable(lambda: graph.team(clients), task=TASK, session_id=session, nexum=nexum))


def _clients(
    graph: Graph, model: ModelChoice, log: Path, interrupt: Callable[[], Awaitable[None]] | None = None
) -> Callable[[str], ChatCompletionClient]:
    """Return a function that makes an agent's model. At the graph's point of interruption, it awaits `interrupt`."""
    from support.graphflow.watched_model import WatchedModel

    return lambda agent: WatchedModel(agent, model, log, graph.at_reply, interrupt if agent == graph.at_agent else None)


def _report(graph: Graph, result: TaskResult) -> None:
    spoke = [message.source for message in result.messages if message.source in graph.agents]
    say(f"{REPORT}{json.dumps({'stop_reason': result.stop_reason, 'spoke': spoke})}")


# ---- Command line ----------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("part", choices=("plain-first", "plain-resume", "durable-first", "durable-again"))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--session", metavar="ID")
    parser.add_argument("--nexum", metavar="HOST:PORT")
    parser.add_argument("--cyclic", action="store_true", help="run the graph with a loop instead of the chain")
    parser.add_argument("--offline", action="store_true", help="run without a model key")
    add_until_stdin_closes_option(parser)
    return parser


async def run(args: argparse.Namespace) -> None:
    """Run the part that the command line names."""
    graph = CYCLIC if args.cyclic else IN_A_ROW
    model = choose_model(os.environ, offline=args.offline)
    if args.part == "plain-first":
        await plain_first(graph, model, args.folder)
    elif args.part == "plain-resume":
        await plain_resume(graph, model, args.folder)
    else:
        log = args.folder / args.part
        await durable(graph, model, log, args.session, args.nexum, dies=args.part == "durable-first")


def main() -> int:
    """Run one part from the command line. Return the exit code. Raises NexumError if the part can't run."""
    args = build_parser().parse_args()
    if args.until_stdin_closes:
        when_stdin_closes(lambda: os._exit(1))
    asyncio.run(run(args))
    return 0


if __name__ == "__main__":
    log_to(sys.stderr, logging.WARNING)
    say_what_is_logged("durable_autogen", "nexum_engine")
    run_script(main)
