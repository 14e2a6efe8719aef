"""Start the Nexum server, or look at what it has recorded.

    python -m nexum_engine                        start the server
    python -m nexum_engine ps                     list executions
    python -m nexum_engine show EXECUTION         show an execution: nodes, attempts, workers, times, errors
    python -m nexum_engine cancel EXECUTION       cancel an execution
    python -m nexum_engine retry EXECUTION        continue a FAILED execution at its failed node
    python -m nexum_engine approvals              list the nodes that wait for a person's approval
    python -m nexum_engine approve EXECUTION      complete a node that waits for approval; reject fails it
    python -m nexum_engine unknown                list the nodes whose effect may or may not have happened
    python -m nexum_engine resolve EXECUTION      say whether the effect of such a node has happened
    python -m nexum_engine tools                  list the tools of connected workers and runs, with their policies
    python -m nexum_engine send EXECUTION NAME    send an event to an execution
    python -m nexum_engine prune --older-than 30d delete executions that ended long ago
    python -m nexum_engine backup FILE            write a copy of the database to a file
    python -m nexum_engine check FILE             check a database or a backup for damage
    python -m nexum_engine restore FILE           replace the database by a backup, and keep the former one

After an installation with pip, `nexum` stands for `python -m nexum_engine`. Any installed package can add a command to
it, by an entry point of the group `nexum.commands`: durable_autogen adds `nexum budget SESSION`.

The commands ask the server that has this folder's database open, else the server on the default port. If neither
answers, they open the database themselves, so they also work without a server. With --database-url, they open that
database and ask no server.
"""

from __future__ import annotations

from nexum_engine.ctrl_c import INTERRUPTED, end_on_ctrl_c, interrupt_on_ctrl_c

if __name__ == "__main__":
    end_on_ctrl_c()  # first, so that Ctrl+C during the slow imports prints no traceback

import argparse
import atexit
import gc
import io
import logging
import os
import sys
from collections.abc import Callable, Collection
from pathlib import Path

from nexum_engine import (
    DEFAULT_LEASE,
    DEFAULT_LISTEN,
    DEFAULT_MAX_CALLS,
    DEFAULT_MAX_QUEUE,
    VERSION,
    event_loop,
    maintenance,
)
from nexum_engine import commands as about_executions
from nexum_engine.commands import complain, say
from nexum_engine.connection import DEFAULT_ADDRESS
from nexum_engine.errors import AccessDenied, InvalidRequest, NexumError, NotANexumServer, NotFound, ServerUnavailable
from nexum_engine.location import DEFAULT_DATABASE_URL, database_path, default_database_url
from nexum_engine.options import count, duration, refuse_bytes, seconds
from nexum_engine.store import restore_database
from nexum_engine.streams import in_words, open_closed_streams

SWITCH_INTERVAL = 0.0002  # seconds


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    return _parser_and_commands()[0]


def _parser_and_commands() -> tuple[argparse.ArgumentParser, Collection[str]]:
    """Return the parser of the command line, and the names of the commands that it knows."""
    parser = argparse.ArgumentParser(
        prog=_program(),
        description="The Nexum server. Without a command it starts and serves until Ctrl+C.",
        epilog="After an installation with pip, durable_autogen adds a command: nexum budget SESSION.",
    )
    parser.set_defaults(run=lambda args: event_loop.run(_serve(args)))
    parser.add_argument("--version", action="version", version=f"Nexum engine {VERSION}")
    _add_server_options(parser)
    _add_database(parser, None)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for command in (*about_executions.add_commands(commands), *maintenance.add_commands(commands)):
        command.add_argument(
            "--nexum",
            metavar="HOST:PORT",
            help="the server to ask (default: $NEXUM_ADDRESS, else the server that has this folder's database open, "
            f"else {DEFAULT_ADDRESS}; if none answers, this command opens the database itself)",
        )
        _add_database(command, argparse.SUPPRESS)
    restore = commands.add_parser(
        "restore",
        help="replace the database by a backup; stop its server first",
        description="Replace the database by a backup, and keep the former database beside it. Stop its server first.",
    )
    restore.set_defaults(run=_restore)
    restore.add_argument("backup", type=Path, metavar="FILE", help="the backup: a copy of a database")
    _add_database(restore, argparse.SUPPRESS)
    return parser, commands.choices


def _add_server_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--listen",
        default=DEFAULT_LISTEN,
        metavar="HOST:PORT",
        help="a loopback address or, with TLS and tokens, any IP address of this machine (default: %(default)s)",
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
    parser.add_argument(
        "--max-queue",
        type=count(),
        default=DEFAULT_MAX_QUEUE,
        metavar="N",
        help="how many tasks may wait for workers until starts are refused (default: %(default)s)",
    )
    parser.add_argument(
        "--max-calls",
        type=count(),
        default=DEFAULT_MAX_CALLS,
        metavar="N",
        help="how many calls may run or wait at the same time on all streams (default: %(default)s)",
    )
    for option, what in (
        ("--tls-cert", "the server's certificate chain, in PEM format"),
        ("--tls-key", "the key of the certificate"),
        ("--tls-client-ca", "the CA of the certificates that clients must show"),
        ("--tokens", "the tokens that clients must send: lines of a name, a role (use or administer) and a token"),
    ):
        variable = f"NEXUM_SERVER_{option[2:].replace('-', '_').upper()}"
        parser.add_argument(
            option,
            type=Path,
            default=os.environ.get(variable) or None,
            metavar="FILE",
            help=f"{what} (default: ${variable}, else none)",
        )


def _program() -> str:
    """Return the command that the person typed: `nexum` or `python -m nexum_engine`."""
    return "nexum" if Path(sys.argv[0]).stem == "nexum" else "python -m nexum_engine"


def _add_database(parser: argparse.ArgumentParser, default: str | None) -> None:
    parser.add_argument(
        "--database-url",
        default=default,
        metavar="URL",
        help="the database, as sqlite:///path or postgresql://user@host/name "
        f"(default: $DATABASE_URL, else {DEFAULT_DATABASE_URL} in this folder)",
    )


def _added(command: str) -> Callable[[list[str]], int] | None:
    """Return the function that runs `command`, if an installed package adds this command. Otherwise, return None."""
    from importlib.metadata import entry_points  # slow, and rarely needed

    found = next(iter(entry_points(group="nexum.commands", name=command)), None)
    return None if found is None else found.load()


async def _serve(args: argparse.Namespace) -> int:
    """Run the server until it is stopped; return the exit code."""
    # Let the threads take shorter turns than Python's default of 5 ms: each message goes from a thread of gRPC to the
    # event loop, and some transactions go to the thread of the store and back.
    sys.setswitchinterval(SWITCH_INTERVAL)
    from nexum_engine.server import Limits, ServerTls, Tokens, run_server
    from nexum_engine.signals import stop_event

    if (args.tls_cert is None) != (args.tls_key is None) or (args.tls_client_ca and not args.tls_cert):
        raise InvalidRequest("TLS needs both --tls-cert and --tls-key")
    tls = None if args.tls_cert is None else ServerTls(args.tls_cert, args.tls_key, args.tls_client_ca)

    was_ready = False

    def on_ready(address: str, database: str) -> None:
        nonlocal was_ready
        was_ready = True
        say(f"Nexum engine {VERSION} on {address}, database {database} (Ctrl+C to stop)")
        # Exclude the 60,000 objects of the imports from garbage collection. A full collection stops the event loop for
        # about 1 ms for each 2,500 objects.
        gc.collect()
        gc.freeze()

    await run_server(
        args.listen,
        default_database_url() if args.database_url is None else args.database_url,
        lease=args.lease,
        keep=args.keep,
        patience=args.patience,
        else_free_port=args.else_free_port,
        tls=tls,
        limits=Limits(calls=args.max_calls, queue=args.max_queue),
        tokens=None if args.tokens is None else Tokens(args.tokens),
        stop=stop_event(),
        on_ready=on_ready,
    )
    if not was_ready:
        say("stopped while another server still had the port or the database")
    return 0


def _restore(args: argparse.Namespace) -> int:
    url = default_database_url() if args.database_url is None else args.database_url
    former = restore_database(url, args.backup)
    kept = "" if former is None else f"; the former database is kept as {former}"
    say(f"{database_path(url)} now has the contents of {args.backup}{kept}")
    return 0


def _session_hint(args: argparse.Namespace, error: NexumError) -> str:
    """Return the next step for a person who has given a session's id as the id of an execution."""
    name = getattr(args, "execution", None) or "exec-"
    if not isinstance(error, NotFound) or name.startswith("exec-"):
        return ""
    return f"; if {name} is a durable session: python -m durable_autogen show {name}"


def main(argv: list[str] | None = None) -> int:
    """Run `nexum` or `python -m nexum_engine`; return the exit code."""
    try:
        interrupt_on_ctrl_c()
        return _run(argv)
    except KeyboardInterrupt:
        return INTERRUPTED


def _run(argv: list[str] | None) -> int:
    open_closed_streams()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Print a question mark for a character that the console can't show. By default Python raises an error.
            stream.reconfigure(errors="replace")
    parser, commands = _parser_and_commands()
    given = sys.argv[1:] if argv is None else argv
    refuse_bytes(parser, given)
    if given and not given[0].startswith("-") and given[0] not in commands and (added := _added(given[0])) is not None:
        return added(given)
    args = parser.parse_args(given)
    names = [name for name, _ in getattr(args, "attr", ())]
    for name in names:
        if names.count(name) > 1:
            parser.error(f"--attr names {name!r} twice: an execution has one value for each name")
    try:
        code: int = args.run(args)
        return code
    except NexumError as error:
        complain(f"{error}{_session_hint(args, error)}")
        return 2 if isinstance(error, (ServerUnavailable, NotANexumServer, AccessDenied)) else 1
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # a closed pipe (`| head`) needs no message
            complain(in_words(error))  # for example, the disk is full
        # Discard the rest of the output. Otherwise, Python would try to write it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    atexit.register(gc.freeze)  # don't search for garbage at exit: that takes 0.1 s
    sys.exit(main())
