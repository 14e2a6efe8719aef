"""The commands prune, backup and check of the command line."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import textwrap
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from nexum_engine.client import NexumClient
from nexum_engine.commands import Commands, say
from nexum_engine.errors import Conflict, NotANexumServer, ServerUnavailable
from nexum_engine.location import absolute, database_path, default_database_url, read_address
from nexum_engine.options import duration, not_empty
from nexum_engine.records import Pruned
from nexum_engine.report import WIDTH, printable, size
from nexum_engine.server_or_database import on_server_or_database, when_released
from nexum_engine.store import Checked, Store, check_database, retention

PROGRESS_INTERVAL = 2.0  # seconds between two progress lines of a long command


def add_commands(commands: Commands) -> list[argparse.ArgumentParser]:
    """Add the commands to the parser of the command line. Return the commands that ask a server."""
    prune = commands.add_parser(
        "prune",
        help="delete executions that ended long ago",
        description="Delete executions that ended long ago, with all that belongs to them. A RUNNING execution is "
        "never deleted. The executions of a session are deleted together, when all of them have ended long ago. "
        "If an execution is started again with the key of a deleted one, the work is done again.",
    )
    prune.add_argument(
        "--older-than",
        type=duration,
        required=True,
        metavar="AGE",
        help="delete what ended at least this long ago: 45s, 90m, 12h, 30d or 8w; 0s for all that has ended",
    )
    prune.add_argument(
        "--session",
        type=not_empty,  # without a session, all old executions are deleted
        help="only the executions whose keys begin with SESSION/ or SESSION:, such as those of a durable run",
    )
    prune.add_argument("--dry-run", action="store_true", help="only count what would be deleted")
    prune.add_argument(
        "--compact",
        action="store_true",
        help="release all free space of the file to the disk, even if it is little or if this takes long (a second for "
        "each 100 MB in use); meanwhile the server answers no calls",
    )
    backup = commands.add_parser(
        "backup",
        help="write a copy of the database to a file",
        description="Write a copy of the database to a file, which `restore` can read. The server still answers calls.",
    )
    backup.add_argument("file", type=Path, metavar="FILE", help="the new file, on the machine of the server")
    backup.add_argument("--overwrite", action="store_true", help="replace FILE if it is a Nexum database")
    check = commands.add_parser(
        "check",
        help="check a database or a backup for damage",
        description="Check a database or a backup: the file, the references in it, and what the engine relies on. The "
        "database may be in use. The command changes nothing. It prints a line for each finding, and ends with exit "
        "code 1 if there is one.",
    )
    check.add_argument(
        "file",
        type=Path,
        nargs="?",
        metavar="FILE",
        help="the database or backup (default: $DATABASE_URL, else this folder's database)",
    )
    for command, run in ((prune, _prune), (backup, _backup), (check, _check)):
        command.set_defaults(run=run)
        command.add_argument("--json", action="store_true", help="print JSON")
    return [prune, backup]


# ---- prune -----------------------------------------------------------------------------------------------------------


def _prune(args: argparse.Namespace) -> int:
    found = asyncio.run(on_server_or_database(args, partial(_prune_on_server, args), partial(_prune_in_store, args)))
    say(_pruned(args, found))
    return 0


async def _prune_on_server(args: argparse.Namespace, client: NexumClient) -> Pruned:
    async def part(after: int) -> Pruned:
        return await client.prune(
            args.older_than, session=args.session or "", dry_run=args.dry_run, after=after, compact=args.compact
        )

    return await _all_parts(part)


async def _prune_in_store(args: argparse.Namespace, store: Store) -> Pruned:
    verdicts: retention.Verdicts = {}

    async def part(after: int) -> Pruned:
        pruned = await store.run_alone(
            retention.prune,
            round(args.older_than * 1000),
            session=args.session or "",
            after=after,
            dry_run=args.dry_run,
            verdicts=verdicts,
        )
        if pruned.after is not None or args.dry_run:
            return pruned
        return replace(pruned, **asdict(await store.compact(max_bytes=None, always=args.compact)))

    return await _all_parts(part)


async def _all_parts(part: Callable[[int], Awaitable[Pruned]]) -> Pruned:
    progress = _Progress()
    total = await part(0)
    while total.after is not None:
        progress.say(f"{total.executions:,} executions so far")
        total += await part(total.after)
    return total


def _pruned(args: argparse.Namespace, found: Pruned) -> str:
    if args.session and not found.executions:
        raise Conflict(
            f"session {args.session} is kept: it has an execution that is RUNNING, or that ended more recently. List "
            f"its executions with: ps --all --key {args.session}"
        )
    if args.json:
        counts = {"executions": found.executions, "sessions": found.sessions, "kept": found.kept}
        space = {
            "total_bytes": found.total_bytes,
            "free_bytes": found.free_bytes,
            "released_bytes": found.released_bytes,
        }
        return json.dumps({**counts, "dry_run": args.dry_run, **({} if args.dry_run else space)}, indent=2)
    text = f"{'would delete' if args.dry_run else 'deleted'} {_count(found.executions, 'execution')}"
    if found.sessions:
        text += f", among them {_count(found.sessions, 'session')}"
    if found.kept:
        text += f"; {found.kept:,} of that age kept: RUNNING, or in a session that is RUNNING or has a newer execution"
    lines = [text]
    if not args.dry_run:
        released = f"; {size(found.released_bytes)} released to the disk" if found.released_bytes else ""
        lines.append(
            f"the database: {size(found.total_bytes)}, {size(found.free_bytes)} of it free for new executions{released}"
        )
    return "\n".join(textwrap.fill(line, WIDTH - 1, subsequent_indent="  ") for line in lines)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


# ---- backup ----------------------------------------------------------------------------------------------------------


def _backup(args: argparse.Namespace) -> int:
    file, progress = absolute(args.file), _Progress()
    total = asyncio.run(
        on_server_or_database(
            args,
            lambda client: _copy_from_server(client, file, overwrite=args.overwrite),
            lambda store: store.backup(file, overwrite=args.overwrite, progress=progress.say_copied),
        )
    )
    say(json.dumps({"file": str(file), "bytes": total}, indent=2) if args.json else f"{args.file}: {size(total)}")
    return 0


async def _copy_from_server(client: NexumClient, file: Path, *, overwrite: bool) -> int:
    progress = _Progress()
    total = 0
    async with aclosing(client.backup(file, overwrite=overwrite)) as steps:
        async for copied, total in steps:
            progress.say_copied(copied, total)
    return total


# ---- check -----------------------------------------------------------------------------------------------------------


def _check(args: argparse.Namespace) -> int:
    file = database_path(default_database_url()) if args.file is None else absolute(args.file)
    checked = asyncio.run(when_released(lambda: _checked(file)))
    if args.json:
        found = {"file": str(file), "executions": checked.executions, "findings": checked.findings}
        say(json.dumps(found, indent=2))
    elif checked.findings:
        say("\n".join(map(printable, checked.findings)))
    else:
        say(f"{file} is sound: {_count(checked.executions, 'execution')}")
    return 1 if checked.findings else 0


async def _checked(file: Path) -> Checked:
    on_server = await _checked_on_server(file)
    return await asyncio.to_thread(check_database, file) if on_server is None else on_server


async def _checked_on_server(file: Path) -> Checked | None:
    """Get a copy from the server that has `file` open, and check the copy. Return None if no server has it open."""
    if read_address(file) is None:
        return None
    with tempfile.TemporaryDirectory(prefix="nexum-check-") as folder:
        copy = Path(folder) / "copy.db"
        try:
            async with NexumClient(str(file)) as client:
                await client.server_info()
                await _copy_from_server(client, copy, overwrite=False)
        except (ServerUnavailable, NotANexumServer):
            return None
        return await asyncio.to_thread(check_database, copy)


class _Progress:
    """Lines on standard error about a command that takes long."""

    def __init__(self) -> None:
        self._next = time.monotonic() + PROGRESS_INTERVAL

    def say(self, text: str) -> None:
        """Print `text`, but at most one line in PROGRESS_INTERVAL seconds."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + PROGRESS_INTERVAL
            print(text, file=sys.stderr, flush=True)

    def say_copied(self, copied: int, total: int) -> None:
        """Print how many bytes of a backup are copied."""
        self.say(f"{size(copied)} of {size(total)} copied")
