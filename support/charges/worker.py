"""Run a worker that serves only the charging tools of one drill of crash_demo.py --effect.

    python -m support.charges.worker --drill NAME --nexum HOST:PORT

CHARGE_LEDGER names the ledger's file. CRASH_AFTER_CHARGE=1 kills the worker between its first charge and the report.
"""

from __future__ import annotations

from support.console import begin_script

begin_script(__name__)  # first, so that Ctrl+C during the slow imports prints no traceback

import argparse

from nexum_engine import event_loop
from nexum_engine.client import NexumClient
from nexum_engine.signals import stop_event
from nexum_engine.worker import Worker
from support.charges.tools import drill_workflow
from support.console import run_script
from support.offline.web import OfflineWeb
from support.options import add_nexum_option, add_until_stdin_closes_option
from support.tool_calls import bindings


async def main() -> int:
    """Run the worker until a signal stops it. Return the exit code. Raises NexumError if the worker can't run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--drill", required=True, metavar="NAME", help="serve only this drill")
    add_nexum_option(parser)
    add_until_stdin_closes_option(parser)
    args = parser.parse_args()
    stop = stop_event(until_stdin_closes=args.until_stdin_closes)
    async with NexumClient(args.nexum) as client:
        served = bindings(client, drill_workflow(args.drill), OfflineWeb())
        await Worker(client, served, concurrency=1).run(stop)
    return 0


if __name__ == "__main__":
    run_script(lambda: event_loop.run(main()))
