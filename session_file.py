"""The session file `.session-<id>.json`: which execution a session started for which call.

It is an index, not the record: results are on the server, and if the file is lost the idempotency key finds them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import time
from pathlib import Path

from filelock import FileLock
from pydantic import BaseModel, Field, ValidationError

from console import say
from nexum_engine.errors import InvalidRequest

_SESSION_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_LOCK_TIMEOUT = 30.0  # seconds


class SessionRecord(BaseModel):
    """The file's contents."""

    created_at: float = Field(default_factory=time.time)
    """Seconds since 1970, UTC."""
    executions: dict[str, dict[str, str]] = Field(default_factory=dict)
    """Execution ids by workflow and call key."""

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
    """One session's file in `folder` (the working directory). Safe to write from many tasks and processes at once."""

    def __init__(self, session_id: str, folder: Path | None = None) -> None:
        folder = folder or Path.cwd()
        self.path = folder / f".session-{check_session_id(session_id)}.json"
        self._file_lock_path = f"{self.path}.lock"
        self._known = SessionRecord()
        self._seen: tuple[int, int, int] | None = None
        self._waiting: dict[tuple[str, str], str] = {}
        self._writing = asyncio.Lock()

    def load(self) -> SessionRecord | None:
        """The contents; None if there is no file. A corrupt file is set aside, and said."""
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except UnicodeDecodeError as error:
            self._set_aside(str(error))
            return None
        try:
            return SessionRecord.model_validate_json(text)
        except ValidationError as error:
            self._set_aside(error.errors()[0]["msg"])
            return None

    def _set_aside(self, why: str) -> None:
        aside = self.path.with_name(f"{self.path.name}.corrupt-{time.time_ns()}")
        # Another process may have found it first; then it is aside already.
        with contextlib.suppress(FileNotFoundError):
            self.path.replace(aside)
        say(f"[Nexum] {self.path.name} is corrupt ({why}); kept as {aside.name}, the server still has its results")

    async def find(self, workflow_id: str, key: str) -> str | None:
        """The execution that was started for this call."""
        known = self._known.executions.get(workflow_id, {}).get(key)
        if known is None and await asyncio.to_thread(self._refresh):
            known = self._known.executions.get(workflow_id, {}).get(key)
        return known

    async def record(self, workflow_id: str, key: str, execution_id: str) -> None:
        """Write down an execution. Calls at the same time share one write."""
        self._waiting[workflow_id, key] = execution_id
        async with self._writing:
            if (workflow_id, key) not in self._waiting:
                return  # the writer before took it along
            batch, self._waiting = self._waiting, {}
            try:
                await asyncio.to_thread(self._merge, batch)
            except OSError as error:
                say(f"[Nexum] {self.path} can't be written ({error}); the server still has this session's results")

    def _refresh(self) -> bool:
        """Read the file again if it changed; whether it did."""
        signature = self._signature()
        if signature is None or signature == self._seen:
            return False
        self._known = self.load() or SessionRecord()
        self._seen = signature
        return True

    def _signature(self) -> tuple[int, int, int] | None:
        try:
            stat = self.path.stat()
        except FileNotFoundError:
            return None
        return stat.st_ino, stat.st_mtime_ns, stat.st_size

    def _merge(self, batch: dict[tuple[str, str], str]) -> None:
        with FileLock(self._file_lock_path, timeout=_LOCK_TIMEOUT, mode=0o600, thread_local=False):
            # Unless another process wrote since, what is in memory is what is in the file.
            if self._signature() != self._seen or self._seen is None:
                self._known = self.load() or SessionRecord()
            for (workflow_id, key), execution_id in batch.items():
                self._known.executions.setdefault(workflow_id, {})[key] = execution_id
            self._write(self._known.model_dump_json(indent=1))
            self._seen = self._signature()

    def _write(self, text: str) -> None:
        """Replace the file as a whole, so that no reader and no crash sees a part of it."""
        temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        descriptor = os.open(temporary, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)
