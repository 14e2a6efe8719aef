"""Run a program and count its work. The counts are in a file that other processes can read at any time.

python tests/support/counted.py FILE -m nexum_engine --listen ...
python tests/support/counted.py FILE worker.py ...
"""

from __future__ import annotations

import asyncio
import mmap
import os
import runpy
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAMES = ("loop turns", "loop callbacks", "statements", "commits", "Python's fsyncs", "RPCs", "messages")
_BYTES = 8 * len(NAMES)


class Counts:
    """Counters in a file. Several processes may have the file open."""

    def __init__(self, path: Path) -> None:
        with path.open("ab+") as file:
            if not path.stat().st_size:
                file.truncate(_BYTES)
            self._cells = memoryview(mmap.mmap(file.fileno(), _BYTES)).cast("q")

    def add(self, name: str) -> None:
        """Add one to a counter."""
        self._cells[NAMES.index(name)] += 1

    def read(self) -> dict[str, int]:
        """Return the counters."""
        return dict(zip(NAMES, self._cells, strict=True))


def count_in_this_process(counts: Counts) -> None:
    """Count what this process does from now on: the turns and callbacks of its event loops, SQL, and fsyncs."""
    # Make the import of uvloop fail, because its turns can't be counted. The process then uses asyncio's loop.
    sys.modules["uvloop"] = None  # type: ignore[assignment]

    def counted(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            counts.add(name)
            return function(*args, **options)

        return call

    for owner, method, name in (
        (asyncio.BaseEventLoop, "_run_once", "loop turns"),
        (asyncio.Handle, "_run", "loop callbacks"),
        (os, "fsync", "Python's fsyncs"),
    ):
        setattr(owner, method, counted(getattr(owner, method), name))

    connect = sqlite3.connect

    def traced(statement: str) -> None:
        counts.add("statements")
        if statement == "COMMIT":
            counts.add("commits")

    def connect_traced(*args: Any, **options: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = connect(*args, **options)
        connection.set_trace_callback(traced)
        return connection

    sqlite3.connect = connect_traced  # type: ignore[assignment]


def main(file: str, *command: str) -> None:
    """Run a module or a script, and count what it does."""
    count_in_this_process(Counts(Path(file)))
    if command[0] == "-m":
        from nexum_engine.store import sqlite

        sqlite.QUICK_TRANSACTION = 60.0  # so that the counts don't depend on the speed of the disk
        sys.argv = list(command[1:])
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(command)
        sys.path.insert(0, str(Path(command[0]).parent))
        runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
