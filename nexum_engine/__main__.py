"""Start the Nexum server, or look at what it has recorded.

    python -m nexum_engine                        start the server
    python -m nexum_engine ps                     list executions
    python -m nexum_engine show EXECUTION         show an execution: nodes, attempts, workers, times, errors
    python -m nexum_engine cancel EXECUTION       cancel an execution
    python -m nexum_engine retry EXECUTION        continue a FAILED execution at its failed node
    python -m nexum_engine prune --older-than 30d delete executions that ended long ago
    python -m nexum_engine backup FILE            write a copy of the database to a file
    python -m nexum_engine check FILE             check a database or a backup for damage
    python -m nexum_engine restore FILE           replace the database by a backup, and keep the former one

If the package is installed, `nexum` is the same command.

ps, show, cancel, retry, prune and backup ask the server that has this folder's database open, else the server on the
default port. If neither answers, they open the database themselves, so they work after a demo has ended. With
--database-url, they open that database and ask no server.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import gc
import io
import logging
import os
import sys

# Turn grpc's log off, before grpc is imported and reads the variable. Our errors report the same failures.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from nexum_engine import DEFAULT_LEASE, DEFAULT_LISTEN, VERSION, event_loop, maintenance, report
from nexum_engine.client import NexumClient
from nexum_engine.clock import SystemClock
from nexum_engine.connection import DEFAULT_ADDRESS
from nexum_engine.errors import (
    InvalidRequest,
    NexumError,
    NotANexumServer,
    ServerUnavailable,
    StoreLocked,
    StoreRefused,
)
from nexum_engine.location import DEFAULT_DATABASE_URL, database_path, default_database_url
from nexum_engine.options import attribute, count, duration, moment, seconds
from nexum_engine.records import Execution, ExecutionStatus
from nexum_engine.screen import Screen
from nexum_engine.store import Store, database_exists, executions, listing, open_store, reading, restore_database
from nexum_engine.store.retry import retry_execution
from nexum_engine.streams import in_words, open_closed_streams

SWITCH_INTERVAL = 0.0002  # seconds
WATCH_INTERVAL = 1.0  # seconds
LOOK_PATIENCE = 3.0  # seconds to wait until an ending server releases the database
T = TypeVar("T")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog=_program(),
        description="The Nexum server. Without a command it starts and serves until Ctrl+C.",
    )
    parser.add_argument("--version", action="version", version=f"Nexum engine {VERSION}")
    parser.add_argument(
        "--listen", default=DEFAULT_LISTEN, metavar="HOST:PORT", help="a loopback address (default: %(default)s)"
    )
    parser.add_argument(
        "--lease",
        type=seconds(0.1),
        default=DEFAULT_LEASE,
        metavar="SECONDS",
        help="how long a silent worker keeps its tasks (default: %(default)s)",
    )
    parser.add_argument(
        "--patience",
        type=seconds(),
        default=0.0,
        metavar="SECONDS",
        help="how long to wait until another server releases the port and the database (default: don't wait)",
    )
    parser.add_argument(
        "--else-free-port", action="store_true", help="if the port is taken, listen on a free one instead"
    )
    parser.add_argument(
        "--keep",
        type=duration,
        metavar="AGE",
        help="delete executions that ended longer ago than this, as prune does: 12h, 30d, 8w (default: keep all)",
    )
    _add_database(parser, None)
    commands = parser.add_subparsers(dest="command", metavar="{ps,show,cancel,retry,prune,backup,check,restore}")
    ps = commands.add_parser(
        "ps",
        help="list executions, newest first",
        description="List executions, newest first. A durable session is one row: its latest run, with the session's "
        "question, calls and tokens.",
    )
    ps.add_argument("--workflow", default="", help="only executions of this workflow, without grouping sessions")
    ps.add_argument("--status", default="", type=str.upper, help="only RUNNING, COMPLETED, FAILED or CANCELLED ones")
    ps.add_argument(
        "--key",
        default="",
        metavar="PREFIX",
        help="only those whose idempotency key begins with PREFIX (needs --workflow)",
    )
    ps.add_argument(
        "--since",
        type=moment,
        default=0,
        metavar="TIME",
        help="only those that were started since then: an age (30s, 15m, 2h, 7d) or a date (2026-01-31, "
        "2026-01-31T12:00: local time, or with Z or +01:00)",
    )
    ps.add_argument("--until", type=moment, default=0, metavar="TIME", help="only those that were started before then")
    ps.add_argument(
        "--attr",
        type=attribute,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="only those with this attribute; repeat the option for several",
    )
    ps.add_argument("--all", action="store_true", help="list each execution of a session, too")
    ps.add_argument(
        "--limit", type=count(1, 1000), default=20, help="how many to list (default: %(default)s, at most 1000)"
    )
    ps.add_argument(
        "--watch",
        action="store_true",
        help="refresh the list each second until Ctrl+C; without a terminal, print what changes",
    )
    show = commands.add_parser("show", help="show an execution with its nodes and attempts")
    show.add_argument(
        "--follow",
        action="store_true",
        help="refresh until the execution ends; without a terminal, print what happens. The exit code is 0 if it "
        "COMPLETED, else 1",
    )
    cancel = commands.add_parser("cancel", help="cancel an execution")
    retry = commands.add_parser(
        "retry",
        help="continue a FAILED execution at its failed node",
        description="Continue a FAILED execution at its failed node, with fresh retries. Recorded results are kept.",
    )
    for command in (show, cancel, retry):
        command.add_argument("execution", metavar="EXECUTION", help="the execution's id, as ps prints it")
    for command in (ps, show):
        command.add_argument(
            "--json", action="store_true", help="print JSON; with --watch or --follow, a line for each change"
        )
    for command in (ps, show, cancel, retry, *maintenance.add_commands(commands)):
        command.add_argument(
            "--nexum",
            metavar="HOST:PORT",
            help="the server to ask (default: $NEXUM_ADDRESS, else the server that has this folder's database open, "
            f"else {DEFAULT_ADDRESS}; if none answers, the database is read directly)",
        )
        _add_database(command, argparse.SUPPRESS)
    restore = commands.add_parser("restore", help="replace the database by a backup; stop its server first")
    restore.add_argument("backup", type=Path, metavar="FILE", help="the backup: a copy of a database")
    _add_database(restore, argparse.SUPPRESS)
    return parser


def _program() -> str:
    """Return the command that the person typed: `nexum` or `python -m nexum_engine`."""
    return "nexum" if Path(sys.argv[0]).stem == "nexum" else "python -m nexum_engine"


def _add_database(parser: argparse.ArgumentParser, default: str | None) -> None:
    parser.add_argument(
        "--database-url",
        default=default,
        metavar="URL",
        help=f"the database, as sqlite:///path (default: $DATABASE_URL, else {DEFAULT_DATABASE_URL} in this folder)",
    )


async def serve(args: argparse.Namespace) -> None:
    """Run the server until it is stopped."""
    # Shorten the turns of threads, 5 ms by default. Each call switches several times between the event loop and the
    # store's thread.
    sys.setswitchinterval(SWITCH_INTERVAL)
    from nexum_engine.server import run_server
    from nexum_engine.signals import stop_event

    def on_ready(address: str, database: str) -> None:
        _say(f"Nexum engine {VERSION} on {address}, database {database} (Ctrl+C to stop)")
        # Exclude the 60,000 objects of the imports from full garbage collections. One stops the event loop for about
        # 1 ms for each 2,500 objects.
        gc.collect()
        gc.freeze()

    await run_server(
        args.listen,
        default_database_url() if args.database_url is None else args.database_url,
        lease=args.lease,
        keep=args.keep,
        patience=args.patience,
        else_free_port=args.else_free_port,
        stop=stop_event(),
        on_ready=on_ready,
    )


def restore(args: argparse.Namespace) -> str:
    """Replace the database by a backup; return what to print."""
    url = default_database_url() if args.database_url is None else args.database_url
    former = restore_database(url, args.backup)
    kept = "" if former is None else f"; the former database is kept as {former}"
    return f"{database_path(url)} now has the contents of {args.backup}{kept}"


async def look(args: argparse.Namespace) -> str:
    """Run ps, show, cancel or retry; return what to print."""
    return await _on_server_or_database(
        args, lambda client: _answer(args, _OnServer(client)), lambda store: _answer(args, _InDatabase(store))
    )


async def maintain(args: argparse.Namespace) -> str:
    """Run prune or backup; return what to print."""
    on_server, in_store = {
        "prune": (maintenance.prune_on_server, maintenance.prune_in_store),
        "backup": (maintenance.backup_on_server, maintenance.backup_in_store),
    }[args.command]
    return await _on_server_or_database(
        args, lambda client: on_server(client, args), lambda store: in_store(store, args)
    )


async def _on_server_or_database(
    args: argparse.Namespace, ask: Callable[[NexumClient], Awaitable[T]], read: Callable[[Store], Awaitable[T]]
) -> T:
    """Ask a server. If none was named and none answers, or a database was named, open the database.

    Raises InvalidRequest if both a server and a database are named.
    """
    if args.database_url is not None:
        if args.nexum is not None:
            raise InvalidRequest("--nexum names a server and --database-url names a database: give only one of them")
        return await _use_database(read, args.database_url)
    address = os.environ.get("NEXUM_ADDRESS") if args.nexum is None else args.nexum
    try:
        async with NexumClient(address or None) as client:
            return await ask(client)
    except (ServerUnavailable, NotANexumServer):
        if address:
            raise
    return await _use_default_database(read)


async def _use_default_database(read: Callable[[Store], Awaitable[T]]) -> T:
    return await _use_database(read, default_database_url(), f"no server on {DEFAULT_ADDRESS}, and ")


async def _use_database(read: Callable[[Store], Awaitable[T]], url: str, tried: str = "") -> T:
    if not database_exists(url):
        raise StoreRefused(f"{tried}no database at {url}: nothing recorded")
    try:
        store = await open_store(url, SystemClock(), lock_timeout=LOOK_PATIENCE)
    except StoreLocked as error:
        raise StoreLocked(f"{tried}a Nexum server has {url} open: ask that server with --nexum HOST:PORT") from error
    try:
        return await read(store)
    finally:
        await store.close()


class _Executions(Protocol):
    """What the commands need of a server or of a database."""

    async def list(self, args: argparse.Namespace) -> list[Execution]: ...

    async def get(self, execution_id: str) -> Execution: ...

    async def cancel(self, execution_id: str) -> None: ...

    async def retry(self, execution_id: str) -> None: ...


class _OnServer:
    def __init__(self, client: NexumClient) -> None:
        self._client = client
        self.cancel, self.retry = client.cancel_execution, client.retry_execution

    async def list(self, args: argparse.Namespace) -> list[Execution]:
        return await self._client.list_executions(
            workflow_id=args.workflow, status=args.status, limit=args.limit, **_conditions(args)
        )

    async def get(self, execution_id: str) -> Execution:
        return (await self._client.get_execution(execution_id, with_attempts=True)).execution


class _InDatabase:
    def __init__(self, store: Store) -> None:
        self._store = store

    async def list(self, args: argparse.Namespace) -> list[Execution]:
        found = await self._store.run(
            listing.list_executions, args.workflow, args.status, args.limit, **_conditions(args)
        )
        # No server has the database open, so no process has a run, whatever is recorded.
        return [
            one if one.session is None else replace(one, session=replace(one.session, is_running=False))
            for one in found
        ]

    async def get(self, execution_id: str) -> Execution:
        return await self._store.run(reading.get_execution, execution_id, True)

    async def cancel(self, execution_id: str) -> None:
        await self._store.run(executions.cancel_execution, execution_id)

    async def retry(self, execution_id: str) -> None:
        await self._store.run(retry_execution, execution_id)


def _conditions(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "key_prefix": args.key,
        "since_ms": args.since,
        "until_ms": args.until,
        "attributes": dict(args.attr),
        "group_sessions": not args.all and not args.workflow,
    }


async def _answer(args: argparse.Namespace, source: _Executions) -> str:
    if args.command == "ps":
        found = await source.list(args)
        return report.as_json(found) if args.json else report.table(found, SystemClock().now_ms())
    if args.command == "show":
        execution = await source.get(args.execution)
        return report.as_json(execution) if args.json else report.details(execution)
    if args.command == "cancel":
        await source.cancel(args.execution)
        return f"{args.execution} is CANCELLED"
    await source.retry(args.execution)
    return f"{args.execution} is RUNNING again"


# ---- Watching --------------------------------------------------------------------------------------------------------


async def watch(args: argparse.Namespace) -> int:
    """Run `ps --watch` or `show --follow`; return the exit code of the latter. The former runs until it is stopped."""
    if args.database_url is not None:
        raise InvalidRequest("without a server nothing changes: leave out --database-url, or --watch and --follow")
    address = os.environ.get("NEXUM_ADDRESS") if args.nexum is None else args.nexum
    screen = Screen(_say, in_place=sys.stdout.isatty() and not args.json)
    is_first = True
    while True:
        try:
            async with NexumClient(address or None) as client:
                while (code := await _refresh(args, _OnServer(client), screen)) is None:
                    is_first = False
                    await asyncio.sleep(WATCH_INTERVAL)
                return code
        except (ServerUnavailable, NotANexumServer):
            if is_first and address:
                raise
        if is_first and (args.command == "show" or database_exists(default_database_url())):
            code = await _use_default_database(lambda store: _refresh(args, _InDatabase(store), screen))
            if code is not None:
                return code
        is_first = False
        # An embedded server ends with its run. Don't keep the database open: the next run opens it.
        screen.note("no server answers: waiting for one (Ctrl+C ends this)")
        await asyncio.sleep(WATCH_INTERVAL)


async def _refresh(args: argparse.Namespace, source: _Executions, screen: Screen) -> int | None:
    """Show the present state. Return the exit code if nothing more will change."""
    if args.command == "ps":
        found = await source.list(args)
        now_ms = SystemClock().now_ms()
        news = [
            (repr(one), report.as_json_line(one) if args.json else report.row(one, now_ms)) for one in reversed(found)
        ]
        lines = report.table(found, now_ms).splitlines()
        screen.show(lines, news if args.json else [("", report.HEADING), *news])
        return None
    execution = await source.get(args.execution)
    facts = [report.as_json_line(execution)] if args.json else report.changes(execution)
    screen.show(report.details(execution).splitlines(), [(fact, fact) for fact in facts])
    if not execution.status.ended:
        return None
    return 0 if execution.status is ExecutionStatus.COMPLETED else 1


def _say(text: str) -> None:
    """Print and flush `text`. Raises BrokenPipeError, on every system, if nobody reads standard output."""
    try:
        print(text, flush=True)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        # Raise BrokenPipeError here, too: Windows reports EINVAL for a pipe that nobody reads.
        raise BrokenPipeError(errno.EPIPE, "nobody reads the output") from error


def _complain(error: str) -> None:
    with contextlib.suppress(OSError):  # the stream may be what failed
        print(f"error: {report.printable(error)}", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run `nexum` or `python -m nexum_engine`; return the exit code."""
    open_closed_streams()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Print a question mark for a character that the console can't show. By default Python raises an error.
            stream.reconfigure(errors="replace")
    parser = build_parser()
    args = parser.parse_args(argv)
    names = [name for name, _ in getattr(args, "attr", ())]
    for name in names:
        if names.count(name) > 1:
            parser.error(f"--attr names {name!r} twice: an execution has one value for each name")
    try:
        if args.command is None:
            event_loop.run(serve(args))
        elif args.command == "restore":
            _say(restore(args))
        elif args.command == "check":
            text, is_sound = asyncio.run(maintenance.check(args))
            _say(text)
            return 0 if is_sound else 1
        elif args.command in ("prune", "backup"):
            _say(asyncio.run(maintain(args)))
        elif getattr(args, "watch", False) or getattr(args, "follow", False):
            return asyncio.run(watch(args))
        else:
            _say(asyncio.run(look(args)))
    except NexumError as error:
        _complain(str(error))
        return 2 if isinstance(error, ServerUnavailable) else 1
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            _complain(in_words(error))  # such as a full disk
        # Discard the rest of the output, which Python would otherwise try to write at exit. A closed pipe (`| head`)
        # needs no message.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
