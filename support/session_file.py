"""The session file `.session-<id>.json`: an index from a session's tool calls to their executions.

The server holds the results. If the file is lost, a call finds its result by its idempotency key.
"""

from __future__ import annotations

import asyncio
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeAlias
from weakref import WeakSet

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nexum_engine.errors import InvalidRequest, NexumError
from nexum_engine.forks import in_forked_process
from support.console import say

_SESSION_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_LOCK_TIMEOUT = 30.0  # seconds
_WRITE_DELAY = 0.1  # seconds until `record_soon` writes

_Signature: TypeAlias = tuple[int, int, int]  # inode, time of the last change, size


class SessionFileError(NexumError, OSError):
    """The session file exists but can't be read."""


class SessionRecord(BaseModel):
    """The contents of a session file. A file with other fields was not written by this project."""

    model_config = ConfigDict(extra="forbid")

    created_at: float = Field(ge=0, le=1e11)
    """Seconds since 1970, UTC."""
    executions: dict[str, dict[str, str]]
    """Execution ids by workflow id, then by call key."""

    @classmethod
    def new(cls) -> SessionRecord:
        return cls(created_at=time.time(), executions={})


def check_session_id(session_id: str) -> str:
    """Return the session id. Raises InvalidRequest if the id is not safe as a part of a file's name."""
    if not _SESSION_ID.fullmatch(session_id):
        raise InvalidRequest(
            f"session id {session_id!r} can't be used: give 1 to 64 letters, digits, '-' or '_', "
            "beginning with a letter or a digit"
        )
    return session_id


class SessionFile:
    """One session's file in `folder` (default: the working directory). Many tasks and processes may use it at once.

    `tell` is called, from a thread, with each line about a problem with the file.
    """

    def __init__(self, session_id: str, folder: Path | None = None, *, tell: Callable[[str], None] = say) -> None:
        folder = folder or Path.cwd()
        self._tell = tell
        self.path = folder / f".session-{check_session_id(session_id)}.json"
        self._known = SessionRecord.new()
        self._seen: _Signature | None = None
        self._unreadable: _Signature | None = None
        self._unwritten: deque[tuple[str, str, str]] = deque()
        self._next_write: threading.Timer | None = None
        self._kept_locks: list[FileLock] = []
        self.new_locks()
        _files.add(self)

    def new_locks(self) -> None:
        """Make new locks, as a forked process must: if another thread held a lock at the fork, it stays locked here.

        A forked process doesn't have the thread of the next write, either.
        """
        self._next_write = None
        self._one_thread = threading.Lock()  # a FileLock doesn't exclude threads of one process
        self._one_process = FileLock(f"{self.path}.lock", timeout=_LOCK_TIMEOUT, mode=0o600, thread_local=False)
        # Keep the old locks: a deleted FileLock unlocks its file. If a forked process deleted one, the parent process
        # would lose its lock, too.
        self._kept_locks.append(self._one_process)

    def load(self) -> SessionRecord | None:
        """Return the file's contents. If the file is corrupt, rename it. Return None if no valid file exists.

        Raises SessionFileError if the file can't be read.
        """
        try:
            if not self.path.exists():
                return None
            # Readers lock too: otherwise a reader could set aside a file that a writer has just repaired.
            with self._one_thread, self._one_process:
                return self._read()
        except OSError as error:
            raise SessionFileError(f"the session file {self.path} can't be read ({error.strerror or error})") from error

    async def find(self, workflow_id: str, key: str) -> str | None:
        """Return the id of the execution that the file has for `key`, or None. Report a file that can't be read."""
        known = self._known_id(workflow_id, key)
        if known is None and self._signature() not in (self._seen, self._unreadable):
            await asyncio.to_thread(self._refresh)
            known = self._known_id(workflow_id, key)
        return known

    async def record(self, workflow_id: str, key: str, execution_id: str) -> None:
        """Write an execution's id to the file. If the file can't be written, report that and raise no error."""
        self._add(workflow_id, key, execution_id)
        await asyncio.to_thread(self._write_down)

    def record_soon(self, workflow_id: str, key: str, execution_id: str) -> None:
        """Do what `record` does, 0.1 s later and in a thread. Entries that come meanwhile share the write."""
        self._add(workflow_id, key, execution_id)
        if self._next_write is None:
            # Not a daemon thread: the interpreter waits for the write before it ends.
            self._next_write = threading.Timer(_WRITE_DELAY, self._write_down)
            self._next_write.start()

    async def finish(self) -> None:
        """Write at once what `record_soon` has not written yet."""
        if self._unwritten or self._one_thread.locked():
            await asyncio.to_thread(self._write_down)

    async def create(self) -> None:
        """Create the file, with no calls in it, unless the file exists."""
        await asyncio.to_thread(self._write_down, new=True)

    def _add(self, workflow_id: str, key: str, execution_id: str) -> None:
        self._known.executions.setdefault(workflow_id, {})[key] = execution_id
        self._unwritten.append((workflow_id, key, execution_id))

    def _known_id(self, workflow_id: str, key: str) -> str | None:
        return self._known.executions.get(workflow_id, {}).get(key)

    def _read(self) -> SessionRecord | None:
        try:
            return SessionRecord.model_validate_json(self.path.read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError as error:
            why = error.errors()[0]["msg"]
        aside = self.path.with_name(f"{self.path.name}.corrupt-{time.time_ns()}")
        self.path.replace(aside)
        kept = f"it was renamed to {aside.name}, and the server still has the session's results"
        self._tell(f"[Nexum] {self.path.name} is corrupt ({why}): {kept}")
        return None

    def _refresh(self) -> None:
        signature = self._signature()
        try:
            self._known = self.load() or SessionRecord.new()
            self._seen = signature
        except SessionFileError as error:
            # Remember that this version of the file is unreadable, so that the error is reported only once. The next
            # write tries to read the file again.
            self._unreadable = signature
            self._tell(f"[Nexum] {error}; the server still has this session's results")

    def _write_down(self, new: bool = False) -> None:
        """Write the unwritten entries of all threads. If `new`, write the file even if there are no entries."""
        try:
            with self._one_thread:
                if self._next_write is not None:
                    self._next_write.cancel()
                    self._next_write = None
                entries = [self._unwritten.popleft() for _ in range(len(self._unwritten))]
                if new or entries:
                    with self._one_process:
                        self._merge(entries)
        except OSError as error:
            self._tell(f"[Nexum] {self.path} can't be written ({error}); the server still has this session's results")

    def _merge(self, entries: Iterable[tuple[str, str, str]]) -> None:
        # Read the file again only if another process has changed it, or if this process has not read it yet.
        if self._signature() != self._seen or self._seen is None:
            self._known = self._read() or SessionRecord.new()
        for workflow_id, key, execution_id in entries:
            self._known.executions.setdefault(workflow_id, {})[key] = execution_id
        self._write(self._known.model_dump_json(indent=1))
        self._seen = self._signature()

    def _write(self, text: str) -> None:
        """Replace the file as a whole, so that no reader sees a part of it.

        Don't fsync: if a power failure loses entries of the file, the idempotency keys still find the executions.
        """
        temporary = self.path.with_name(f"{self.path.name}.tmp")
        descriptor = os.open(temporary, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        temporary.replace(self.path)

    def _signature(self) -> _Signature | None:
        try:
            stat = self.path.stat()
        except OSError:  # the file doesn't exist, or its folder can't be entered
            return None
        return stat.st_ino, stat.st_mtime_ns, stat.st_size


_files: WeakSet[SessionFile] = WeakSet()


@in_forked_process
def _make_new_locks() -> None:
    for file in list(_files):
        file.new_locks()
