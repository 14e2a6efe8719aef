"""A PostgreSQL with a streaming replica: a commit is acknowledged when the primary and the replica have it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
from harness import free_port
from postgres import answers, program
from processes import wait_until

DATABASE = "postgres"


class Node:
    """One PostgreSQL of the pair, on loopback."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/{DATABASE}"

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        settings = {"port": self.port, "listen_addresses": "127.0.0.1", "unix_socket_directories": "", "fsync": "off"}
        arguments = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        with (self.folder.parent / f"{self.folder.name}.log").open("wb") as log:
            self._process = subprocess.Popen(
                [program("postgres"), "-D", self.folder, *arguments],
                **_as_user(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        wait_until(lambda: answers(self.url), f"the PostgreSQL on port {self.port} answers")

    def execute(self, statement: str) -> Any:
        """Run a statement; return the first column of its first row, if it has rows."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            cursor = connection.execute(statement.encode())
            row = cursor.fetchone() if cursor.description else None
            return None if row is None else row[0]

    def kill(self) -> None:
        """Kill the server and all its processes with SIGKILL."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(10)


def _as_user() -> dict[str, Any]:
    """Return the options of a subprocess: PostgreSQL refuses to run as root, so root runs it as another user."""
    if sys.platform == "win32" or os.geteuid() != 0:
        return {}
    return {"user": "pgserver", "group": "pgserver", "extra_groups": ()}


def _run(name: str, *arguments: str | Path) -> None:
    subprocess.run([program(name), *arguments], **_as_user(), check=True, capture_output=True)


@contextmanager
def replicated_postgres() -> Iterator[tuple[Node, Node]]:
    """Run a primary and its replica for the length of a `with`.

    The test must also use the fixture `postgres`. If root runs the tests, that fixture creates the user who runs
    PostgreSQL, and lets this user read PostgreSQL's programs.
    """
    # Don't use pytest's folder: if root runs the tests, PostgreSQL runs as another user, who may not enter that folder.
    folder = Path(tempfile.mkdtemp(prefix="nexum-replicated-"))
    primary, replica = Node(folder / "primary"), Node(folder / "replica")
    try:
        if options := _as_user():
            shutil.chown(folder, options["user"], options["group"])
        _run("initdb", "-D", primary.folder, "-U", "postgres", "-A", "trust", "--no-sync", "--no-locale", "-E", "UTF8")
        primary.start()
        _run("pg_basebackup", "-d", primary.url, "-D", replica.folder, "-R", "-c", "fast", "--no-sync")
        replica.start()
        # Set this only now, so that the replica doesn't copy it: when the replica becomes the primary, it must not wait
        # for another replica.
        primary.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
        primary.execute("SELECT pg_reload_conf()")
        wait_until(
            lambda: primary.execute("SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'") == 1,
            "the replica is synchronous",
        )
        yield primary, replica
    finally:
        primary.kill()
        replica.kill()
        shutil.rmtree(folder, ignore_errors=True)
