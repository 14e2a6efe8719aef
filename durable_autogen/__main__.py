"""The command line of durable_autogen: run a script durably; list, show, fork and cancel sessions; send events."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from durable_autogen.budget_command import add_limits
from durable_autogen.record.log import Teller
from durable_autogen.run_script import complain, print_line, run_script
from nexum_engine.ctrl_c import INTERRUPTED, interrupt_on_ctrl_c
from nexum_engine.errors import InvalidRequest, NexumError, ServerError
from nexum_engine.options import count, refuse_bytes, user_name
from nexum_engine.streams import in_words, open_closed_streams

OWNERS_PATIENCE = 1.0  # seconds; the owner of a run has half of that to reconnect to a server that has just started
LOOK_INTERVAL = 0.1  # seconds
T = TypeVar("T")


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m durable_autogen",
        description="Make an AutoGen script durable without changing it; list, show, fork and cancel recorded "
        "sessions; send events to them.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    server = argparse.ArgumentParser(add_help=False)
    server.add_argument(
        "--nexum",
        metavar="HOST:PORT",
        default=os.environ.get("NEXUM_ADDRESS") or None,
        help="address of a running server (default: $NEXUM_ADDRESS, else the server of this folder's database, else "
        "localhost:50051, else this program opens the database itself)",
    )
    one_session = argparse.ArgumentParser(add_help=False, parents=[server])
    one_session.add_argument("session", metavar="SESSION")
    run = commands.add_parser(
        "run",
        parents=[server],
        help="run a script so that it survives crashes",
        description="Run SCRIPT as `python SCRIPT` would, and record its AutoGen calls. After a crash, run the same "
        "command again: the script continues where it stopped. Each further asyncio.run of the script gets its own "
        "session (ID-2, ID-3, ...).",
    )
    run.add_argument(
        "--session", metavar="ID", help="the session's id (default: made from the script's path and arguments)"
    )
    run.add_argument(
        "--on-drift",
        choices=("stop", "continue"),
        default="stop",
        help="what to do if the script differs from the recorded one: stop, or continue live from the difference "
        "(default: %(default)s)",
    )
    run.add_argument(
        "--on-unrecorded",
        choices=("tell", "stop"),
        default="tell",
        help="what to do if the script connects to something or starts a process outside a recorded call: report it "
        "(tell), or stop (default: %(default)s)",
    )
    limits = run.add_argument_group(
        "budget", "Limits over all runs of a session. At a limit, the session waits for the command `budget`."
    )
    add_limits(limits, "budget-")
    run.add_argument(
        "--policies",
        type=Path,
        metavar="FILE",
        help="a TOML file with the policies of tools: for each tool, a table with approval, approval_timeout, effect, "
        "retry, timeout, heartbeat, rate, concurrency; the table [model] is for all model clients (docs/tools.md)",
    )
    run.add_argument(
        "--approve",
        action="store_true",
        help="ask for approvals in this terminal, too, and not only with python -m nexum_engine approve",
    )
    run.add_argument(
        "--park",
        action="store_true",
        help="end with exit code 75 if the script waits for a person; run the command again after the decision",
    )
    run.add_argument(
        "-m", dest="is_module", action="store_true", help="SCRIPT is a module's name, as in python -m NAME"
    )
    run.add_argument("script", metavar="SCRIPT")
    arguments = run.add_argument(
        "arguments", nargs=argparse.REMAINDER, metavar="ARGUMENTS", help="the script's own arguments"
    )
    # If SCRIPT is missing, Python 3.10 to 3.12 would otherwise report that ARGUMENTS are missing, too.
    arguments.required = False
    ls = commands.add_parser(
        "ls", parents=[server], help="list sessions, newest first", description="List sessions, newest first."
    )
    ls.add_argument(
        "--limit",
        type=count(1, 1000),
        default=20,
        metavar="N",
        help="how many to list (default: %(default)s, at most 1000)",
    )
    ls.add_argument("--json", action="store_true", help="print JSON")
    show = commands.add_parser(
        "show",
        parents=[one_session],
        help="show what a session has recorded",
        description="Show the events of SESSION in their order. The number before a call is the N of `fork`.",
    )
    show.add_argument("--json", action="store_true", help="print the whole events as JSON")
    fork = commands.add_parser(
        "fork",
        parents=[server],
        help="begin a session with the first events of another session",
        description="Begin the session NEW with the first N calls of SESSION. Run your program in NEW: it replays "
        "these events and continues live.",
    )
    fork.add_argument("source", metavar="SESSION@N")
    fork.add_argument("new", metavar="NEW")
    fork.add_argument("--message", metavar="TEXT", default="", help="a user message to add after these events")
    fork.add_argument(
        "--effects",
        choices=("refuse", "reuse", "again"),
        default="refuse",
        help="what to do if SESSION has made calls after these events whose effect must happen only once: refuse to "
        "fork, reuse the results if NEW makes equal calls, or make the calls again (default: %(default)s)",
    )
    budget = commands.add_parser(
        "budget",
        parents=[one_session],
        help="raise the budget of a session, or stop the session",
        description="Raise limits of SESSION's budget to new values: before SESSION reaches a limit, while it waits at "
        "one, or while its program doesn't run. Without an option, print what SESSION has used.",
    )
    add_limits(budget)
    budget.add_argument(
        "--stop",
        metavar="REASON",
        nargs="?",
        const="it was stopped",
        help="don't raise the budget: the session's program ends with an error",
    )
    budget.add_argument("--by", metavar="NAME", default=user_name(), help="who decides (default: the user's name)")
    send = commands.add_parser(
        "send",
        parents=[one_session],
        help="send an event to a session",
        description="Send the event NAME to SESSION: its program gets JSON from `await session.wait_for_event(NAME)`. "
        "If the program does not wait for the event now, or does not run, the event is kept.",
    )
    send.add_argument("name", metavar="NAME")
    send.add_argument("payload", metavar="JSON", nargs="?", default="null", help="the payload (default: null)")
    send.add_argument("--key", metavar="KEY", default="", help="a second event NAME with this key changes nothing")
    cancel = commands.add_parser(
        "cancel",
        parents=[one_session],
        help="stop the program that runs a session",
        description="Cancel the run of SESSION: its program ends with RunCancelled, even if it waits for a call. "
        "What is recorded stays. When the program has ended, run it again to continue.",
    )
    cancel.add_argument("--by", metavar="NAME", default=user_name(), help="who cancels (default: the user's name)")
    return parser


async def look(args: argparse.Namespace) -> str:
    """Run a command about recorded sessions; return its output."""
    from durable_autogen import budget_command, session_report
    from durable_autogen.fork import fork_session, fork_source
    from durable_autogen.record.sent_events import send
    from durable_autogen.recorded_sessions import cancel_session, has_begun, list_sessions, show_session
    from nexum_engine import jsontext
    from nexum_engine.client import NexumClient
    from nexum_engine.embedded import EmbeddedNexum
    from nexum_engine.location import default_database_url
    from nexum_engine.report import cancel_in_words
    from nexum_engine.server_or_database import nothing_recorded
    from nexum_engine.store import database_exists

    if args.command != "send" and not args.nexum and not database_exists(url := default_database_url()):
        # Say the same as the commands of nexum. EmbeddedNexum would make an empty database.
        async with NexumClient() as client:
            try:
                await client.ping()
            except ServerError as error:
                raise nothing_recorded(url) from error
    async with EmbeddedNexum(args.nexum, owners=True) as nexum, NexumClient(nexum.address) as client:
        if args.command == "ls":
            sessions = await _without_dead_runs(
                lambda: list_sessions(client, args.limit),
                lambda found: nexum.embedded and any(one.status == "running" for one in found),
            )
            return (
                session_report.sessions_as_json(sessions) if args.json else session_report.table(sessions, time.time())
            )
        if args.command == "show":
            shown = await _without_dead_runs(
                lambda: show_session(client, args.session),
                lambda found: nexum.embedded and found.info.status == "running",
            )
            return session_report.events_as_json(shown) if args.json else session_report.details(shown, time.time())
        if args.command == "send":
            payload = jsontext.parse(args.payload, "the payload")
            await send(client, args.session, args.name, payload, idempotency_key=args.key)
            unbegun = "" if await has_begun(client, args.session) else ", which has not begun: the event is kept for it"
            return f"sent event {args.name!r} to session {args.session}{unbegun}"
        if args.command == "budget":
            return await budget_command.run_command(client, args)
        if args.command == "cancel":
            before = await cancel_session(client, args.session, by=args.by)
            if before is not None:
                words = cancel_in_words(before, round(time.time() * 1000))
                return f"already done: the run of session {args.session} was {words}"
            return f"the run of session {args.session} is cancelled: its program ends. Then run it again to continue"
        source, number = fork_source(args.source)
        await fork_session(client, source, number, args.new, args.message, effects=args.effects)
        copied = f"the first {number} call(s)" if number else "none of the calls"
        return f"session {args.new} begins with {copied} of {source}"


async def _without_dead_runs(read: Callable[[], Awaitable[T]], may_be_dead: Callable[[T], bool]) -> T:
    """Call `read` until its result contains no run that may be dead, or for OWNERS_PATIENCE; return the last result.

    If this process has just opened the database, a run whose process is dead still counts as running for half a second.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + OWNERS_PATIENCE
    found = await read()
    while may_be_dead(found) and loop.time() < end:
        await asyncio.sleep(LOOK_INTERVAL)
        found = await read()
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code.

    Exit code 2 means an error of durable_autogen or of the server. 75 means a parked run.
    """
    try:
        interrupt_on_ctrl_c()
        open_closed_streams()
        parser = build_parser()
        args = parser.parse_args(argv)
        if args.command != "run":  # a script may take any arguments
            refuse_bytes(parser, argv)
    except KeyboardInterrupt:
        return INTERRUPTED
    try:
        if args.command == "run":
            args.arguments = _with_dashes(args.arguments, sys.argv[1:] if argv is None else argv)
            _print_what_is_logged()
            return run_script(args)
        try:
            print_line(asyncio.run(look(args)), sys.stdout)
        except KeyboardInterrupt:  # Ctrl-C in a command about recorded sessions
            return INTERRUPTED
    except (InvalidRequest, NexumError) as error:
        complain(f"error: {error}")
        return 2
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            complain(f"error: {in_words(error)}")  # for example, the disk is full
        with suppress(OSError):  # otherwise Python reports the error at exit, when it flushes standard output
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _with_dashes(arguments: Sequence[str], command_line: Sequence[str]) -> list[str]:
    """Return the script's arguments with a first argument `--`, which argparse drops."""
    before = command_line[: len(command_line) - len(arguments)]
    return ["--", *arguments] if before[-1] == "--" else [*arguments]


class _OwnLogger(logging.Logger):
    """A logger that a script can't turn off. The script knows nothing of its lines, and the user needs them."""

    disabled = property(lambda _: False, lambda *_: None)
    """False: `logging.config` would set it to True, because the script's configuration doesn't name the logger."""

    def isEnabledFor(self, level: int) -> bool:
        """Return whether the level is logged, also after `logging.disable`."""
        return level >= self.getEffectiveLevel()


def _print_what_is_logged() -> None:
    packages = ("durable_autogen", "nexum_engine")
    for name in packages:
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.addHandler(Teller(complain))
        logger.propagate = False  # otherwise the script's own handlers would print these lines again
    for name, found in logging.root.manager.loggerDict.items():
        if isinstance(found, logging.Logger) and name.partition(".")[0] in packages:
            found.__class__ = _OwnLogger


if __name__ == "__main__":
    sys.exit(main())
