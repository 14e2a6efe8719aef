"""Run tool calls: poll a Nexum server for `tool_call` nodes, run the tools that support/tools declares, and report.

Needs a Nexum server (`python -m nexum_engine`), and waits for one. Start as many workers as you like.

    python worker.py
    python worker.py --concurrency 8 --nexum localhost:50051
    python worker.py --tools                                     # list the tools and their policies
"""

from __future__ import annotations

from support.console import begin_script

begin_script(__name__)  # first, so that Ctrl+C during the slow imports prints no traceback

import argparse
import logging
import sys

from nexum_engine import event_loop, report
from nexum_engine.client import NexumClient
from nexum_engine.options import count
from nexum_engine.signals import stop_event
from nexum_engine.worker import TaskContext, Worker
from support.console import log_to, run_script, say
from support.options import add_nexum_option, add_until_stdin_closes_option
from support.tool_calls import bindings
from support.tools import TOOLS
from workflow import OFFLINE_TOOL_CALL, TOOL_CALL


def describe(task: TaskContext) -> str:
    """Return a task's name for the log: the name of its tool, or of its node if the task names no tool."""
    return str(task.input.get("tool_name")) if isinstance(task.input, dict) else task.node_id


async def main(argv: list[str] | None = None) -> int:
    """Run the worker until a signal stops it. Return the exit code. Raises NexumError if the worker can't run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_nexum_option(parser)
    parser.add_argument(
        "--concurrency",
        type=count(1, 1000),
        default=4,
        metavar="N",
        help="tasks at the same time (default: %(default)s)",
    )
    parser.add_argument("--tools", action="store_true", help="only list the tools and their policies")
    add_until_stdin_closes_option(parser)
    args = parser.parse_args(argv)
    if args.tools:
        for tool in TOOLS.values():
            say("\n".join(report.tool(tool.declared)))
        return 0

    from support.offline.web import OfflineWeb
    from support.tools.web.live import LiveWeb

    stop = stop_event(until_stdin_closes=args.until_stdin_closes)
    async with NexumClient(args.nexum) as client:
        worker = Worker(
            client,
            [*bindings(client, TOOL_CALL, LiveWeb()), *bindings(client, OFFLINE_TOOL_CALL, OfflineWeb())],
            tools=[tool.declared for tool in TOOLS.values()],
            concurrency=args.concurrency,
            describe=describe,
        )
        await worker.run(stop)
    return 0


if __name__ == "__main__":
    log_to(sys.stdout, logging.INFO, "%(asctime)s [worker] %(message)s")
    run_script(lambda: event_loop.run(main()))
