"""The session file `.session-<id>.json`: which execution a session started for which call.

It is an index, not the record: results are on the server, and if the file is lost the idempotency key finds them.
"""

from __future__ import annotations

import asyncio
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, ValidationError

from nexum_engine.errors import InvalidRequest, NexumError
from support.console import say

_SESSION_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
WRITE_DELAY = 0.02  # seconds in which calls that follow one another share a write
_LOCK_TIMEOUT = 30.0  # seconds

# One thread for all files, so that reads and writes of this process take turns, and any number of sessions costs no
# more; Python finishes its work before it exits.
_thread = ThreadPoolExecutor(1, thread_name_prefix="session file")


class SessionFileError(NexumError, OSError):
    """The file is there and can't be read."""


class SessionRecord(BaseModel):
    """The file's contents, all of them: anything else was not written by us."""

    model_config = ConfigDict(extra="forbid")

    created_at: float
    """Seconds since 1970, UTC."""
    executions: dict[str, dict[str, str]]
    """Execution ids by workflow and call key."""

    @classmethod
    def new(cls) -> SessionRecord:
        return cls(created_at=time.time(), executions={})

    @property
    def calls(self) -> int:
        return sum(len(keys) for keys in self.executions.values())


def check_session_id(session_id: str) -> str:
    """Raise InvalidRequest unless the id can be part of a file's name (and can't leave the folder)."""
    if not _SESSION_ID.fullmatch(session_id):
        raise InvalidRequest(
            f"session id {session_id!r} can't be used: give 1 to 64 letters, digits, '-' or '_', "
            "beginning with a letter or a digit"
        )
    return session_id


class SessionFile:
    """One session's file in `folder` (the working directory). Safe to write from many tasks and processes at once.

    `tell` gets the lines that say what is wrong with the file; most come from a thread of the file's own.
    """

    def __init__(self, session_id: str, folder: Path | None = None, *, tell: Callable[[str], None] = say) -> None:
        folder = folder or Path.cwd()
        self._tell = tell
        self.path = folder / f".session-{check_session_id(session_id)}.json"
        self._known = SessionRecord.new()
        self._seen: tuple[int, int, int] | None = None
        self._unreadable: tuple[int, int, int] | None = None
        self._waiting: dict[tuple[str, str], str] = {}
        self._last_write: Future[None] | None = None
        self._write_queued = False
        self._write_at = 0.0
        self._write_now = threading.Event()
        # Readers take it too: who finds the file corrupt may be about to set aside what another has just written anew.
        self._lock = FileLock(f"{self.path}.lock", timeout=_LOCK_TIMEOUT, mode=0o600, thread_local=False)

    def load(self) -> SessionRecord | None:
        """The contents; None if there is no file. A corrupt file is set aside, and said. Raises SessionFileError."""
        try:
            if not self.path.exists():
                return None
            with self._lock:
                return self._read()
        except OSError as error:
            raise SessionFileError(f"the session file {self.path} can't be read ({error.strerror or error})") from error

    def _read(self) -> SessionRecord | None:
        try:
            return SessionRecord.model_validate_json(self.path.read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError as error:
            why = error.errors()[0]["msg"]
        aside = self.path.with_name(f"{self.path.name}.corrupt-{time.time_ns()}")
        self.path.replace(aside)
        kept = f"kept as {aside.name}, the server still has its results"
        self._tell(f"[Nexum] {self.path.name} is corrupt ({why}); {kept}")
        return None

    async def find(self, workflow_id: str, key: str) -> str | None:
        """The execution that was started for this call. A file that can't be read is said, and knows none."""
        # While this process writes, what another one wrote is found by its key on the server.
        writing = self._last_write is not None and not self._last_write.done()
        known = self._known_id(workflow_id, key)
        if known is None and not writing and self._signature() not in (self._seen, self._unreadable):
            await asyncio.get_running_loop().run_in_executor(_thread, self._refresh)
            known = self._known_id(workflow_id, key)
        return known

    def _known_id(self, workflow_id: str, key: str) -> str | None:
        return self._waiting.get((workflow_id, key)) or self._known.executions.get(workflow_id, {}).get(key)

    def record(self, workflow_id: str, key: str, execution_id: str) -> Future[None]:
        """Write down an execution soon; the future is done when it is. What waits at the same time shares a write.

        Nobody needs to wait: until it is written, and if it never is, the key finds the execution on the server.
        """
        self._waiting[workflow_id, key] = execution_id
        if self._last_write is None or not self._write_queued:
            self._write_queued = True
            self._write_at = time.monotonic() + WRITE_DELAY
            self._last_write = _thread.submit(self._write_waiting)
        return self._last_write

    async def written(self) -> None:
        """Wait until everything that was recorded is in the file."""
        self._write_now.set()
        if self._last_write is not None:
            await asyncio.wrap_future(self._last_write)
        self._write_now.clear()

    def create(self) -> None:
        """Begin the session, unless it has begun: write the file, with no calls in it yet."""
        self._last_write = _thread.submit(self._write_down, {})

    def _write_waiting(self) -> None:
        self._write_now.wait(self._write_at - time.monotonic())  # not at all, if another file's write took that long
        self._write_queued = False  # first, so that what comes from now on queues a write of its own
        batch = dict(self._waiting)
        self._write_down(batch)
        for entry, execution_id in batch.items():
            if self._waiting.get(entry) == execution_id:
                del self._waiting[entry]

    def _write_down(self, batch: Mapping[tuple[str, str], str]) -> None:
        try:
            self._merge(batch)
        except OSError as error:
            self._tell(f"[Nexum] {self.path} can't be written ({error}); the server still has this session's results")

    def _refresh(self) -> None:
        signature = self._signature()
        try:
            self._known = self.load() or SessionRecord.new()
            self._seen = signature
        except SessionFileError as error:
            self._unreadable = signature  # so that it is said once, and not taken for known when the file is written
            self._tell(f"[Nexum] {error}; the server still has this session's results")

    def _signature(self) -> tuple[int, int, int] | None:
        try:
            stat = self.path.stat()
        except OSError:  # there is none, or its folder can't be entered
            return None
        return stat.st_ino, stat.st_mtime_ns, stat.st_size

    def _merge(self, batch: Mapping[tuple[str, str], str]) -> None:
        with self._lock:
            # Unless another process wrote since, what is in memory is what is in the file.
            if self._signature() != self._seen or self._seen is None:
                self._known = self._read() or SessionRecord.new()
            for (workflow_id, key), execution_id in batch.items():
                self._known.executions.setdefault(workflow_id, {})[key] = execution_id
            self._write(self._known.model_dump_json(indent=1))
            self._seen = self._signature()

    def _write(self, text: str) -> None:
        """Replace the file as a whole, so that no reader and no crash sees a part of it. The lock is held."""
        temporary = self.path.with_name(f"{self.path.name}.tmp")
        descriptor = os.open(temporary, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)
