"""The processes of one peer: their start, their memory and fsyncs, and their end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peers.base import FOLDER, Peer, Settings

BENCHMARKS = Path(__file__).resolve().parent.parent
PATIENCE = 60.0  # seconds that a process may take to start or to end
CALL_PATIENCE = 600.0  # seconds that a caller may take for a command
LOOK_INTERVAL = 0.002  # seconds between two looks for a file
LOG_BYTES = 4096  # how much of the end of a log is read to find its last line


class PeerFailed(Exception):
    """A process of a peer failed. The message ends with the last line of the process's log."""


class Child:
    """A child process that ends with this one."""

    def __init__(self, process: asyncio.subprocess.Process, what: str, log: Path, *, is_guard: bool) -> None:
        self._process = process
        self._what = what
        self._log = log
        self.roots = [] if is_guard else [process.pid]
        """The processes whose memory and system calls are measured. Their children are measured, too."""
        self.guard = process.pid if is_guard else None

    async def answer(self, patience: float = PATIENCE) -> Any:
        """Return the process's next answer."""
        assert self._process.stdout is not None
        reading = asyncio.ensure_future(self._process.stdout.readline())
        done, _ = await asyncio.wait({reading}, timeout=patience)
        if not done:
            reading.cancel()
            raise PeerFailed(f"{self._what} said nothing for {patience:g} s{self._last_words()}")
        if not reading.result():
            raise PeerFailed(f"{self._what} ended{self._last_words()}")
        value = json.loads(reading.result())
        if isinstance(value, dict) and "error" in value:
            raise PeerFailed(f"{self._what}: {value['error']}")
        return value

    def send(self, do: str, **arguments: Any) -> None:
        """Send a command to a caller."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")

    async def ask(self, do: str, patience: float = CALL_PATIENCE, **arguments: Any) -> Any:
        """Send a command to a caller; return its answer."""
        self.send(do, **arguments)
        return await self.answer(patience)

    def _last_words(self) -> str:
        with self._log.open("rb") as log:
            log.seek(max(0, self._log.stat().st_size - LOG_BYTES))
            lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
        return f": {lines[-1]}" if lines else ""

    async def kill(self) -> None:
        """Kill the process, as a crash does, and wait for its end."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()

    async def end(self) -> None:
        """End the process by closing its standard input."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            await asyncio.wait({asyncio.ensure_future(self._process.wait())}, timeout=PATIENCE)
        finally:
            if self._process.returncode is None:
                await self.kill()


class Processes:
    """All processes of one peer in one round. They end with the `async with` block."""

    def __init__(self, peer: Peer, folder: Path, ports: dict[str, int]) -> None:
        self.folder = folder
        self._peer = peer
        self._ports = ports
        self._settings: Settings = {}
        self._children: list[Child] = []

    async def __aenter__(self) -> Processes:
        return self

    async def __aexit__(self, *_: object) -> None:
        # End the last started process first: callers, then workers, then servers. Shield this, so that a second Ctrl+C
        # leaves no process behind.
        ending = asyncio.ensure_future(self._end_all())
        try:
            await asyncio.shield(ending)
        finally:
            await ending

    async def _end_all(self) -> None:
        for child in reversed(self._children):
            await child.end()

    async def _start(self, what: str, *arguments: str, env: dict[str, str] | None = None) -> Child:
        log = self.folder / "log"
        with log.open("ab") as stderr:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "peers", *arguments),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                cwd=self.folder,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join([str(BENCHMARKS), str(BENCHMARKS.parent)]),
                    "PYTHONUNBUFFERED": "1",
                    FOLDER: str(self.folder),
                    **(env or {}),
                },
                limit=2**24,
                # Don't let Ctrl+C reach the child: this process ends its children.
                start_new_session=sys.platform != "win32",
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
            )
        child = Child(process, f"{self._peer.name}'s {what}", log, is_guard=arguments[0] in ("guard", "postgres"))
        self._children.append(child)
        return child

    # ---- What a peer may start: the protocol Host --------------------------------------------------------------------

    def port(self, name: str) -> int:
        """Return a free port of 127.0.0.1. It is the same in every round."""
        if name not in self._ports:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                self._ports[name] = free.getsockname()[1]
        return self._ports[name]

    async def program(self, command: list[str], *, env: dict[str, str] | None = None) -> None:
        """Start a program that ends with the benchmark."""
        await self._start(Path(command[0]).name, "guard", *command, env=env)

    async def postgres(self) -> str:
        """Start a PostgreSQL server with its default settings; return its URL."""
        child = await self._start("PostgreSQL", "postgres", str(self.folder / "postgres"))
        answer = await child.answer()
        child.roots.append(answer["pid"])
        return str(answer["url"])

    # ---- The peer's own processes ------------------------------------------------------------------------------------

    async def serve(self) -> None:
        """Start the peer's servers."""
        self._settings = await self._peer.serve(self)

    async def start_worker(self) -> Child:
        """Start a worker process. The first `answer` of the process says that the worker is ready."""
        return await self._start("worker", "worker", self._peer.name, json.dumps(self._settings))

    async def start_caller(self) -> Child:
        """Start a caller process. The first `answer` of the process says that the caller is ready."""
        return await self._start("caller", "caller", self._peer.name, json.dumps(self._settings))

    async def wait_for(self, path: Path, patience: float = CALL_PATIENCE) -> str:
        """Wait until a process has written a file; return the file's text."""
        deadline = time.monotonic() + patience
        while (text := _text_of(path)) is None:
            if time.monotonic() > deadline:
                raise PeerFailed(f"{self._peer.name}: no call was executed within {patience:g} s")
            await asyncio.sleep(LOOK_INTERVAL)
        return text

    def pids(self) -> list[int]:
        """Return the ids of the peer's processes, without the guards. The list is empty if the system isn't Linux."""
        children: defaultdict[int, list[int]] = defaultdict(list)
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                parent = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[1]
                children[int(parent)].append(int(stat.parent.name))
        found: list[int] = []
        left = [root for child in self._children for root in child.roots]
        # Begin with the roots and with the children of each guard. PostgreSQL has to be one of the roots: it makes
        # itself a daemon, so it is not a child of its guard.
        left += [pid for child in self._children if child.guard for pid in children[child.guard]]
        while left:
            pid = left.pop()
            if pid not in found and Path(f"/proc/{pid}").exists():
                found.append(pid)
                left += children[pid]
        return found

    def memory(self) -> float | None:
        """Return the memory of all processes in MB, with shared pages counted once; None where it can't be read."""
        kilobytes = 0
        for pid in self.pids():
            try:
                rollup = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8")
            except OSError:
                return None
            kilobytes += int(re.search(r"^Pss:\s+(\d+)", rollup, re.MULTILINE).group(1))  # type: ignore[union-attr]
        return kilobytes / 1024 if kilobytes else None


def _text_of(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None


def kill_pid(pid: int) -> None:
    """Kill a process at once, as a crash does."""
    os.kill(pid, getattr(signal, "SIGKILL", signal.SIGTERM))


class Trace:
    """The fsyncs of some processes, as strace sees them. strace misses writes with O_DSYNC and calls of io_uring."""

    CALLS = "fsync,fdatasync,msync,sync_file_range,syncfs"
    _WHOLE = re.compile(r"^(\d+) +(\d+\.\d+) (\w+)\((\d+<([^>]*)>)?.* = 0 <(\d+\.\d+)>$")
    _BEGUN = re.compile(r"^(\d+) +(\d+\.\d+) (\w+)\((\d+<([^>]*)>)?.* <unfinished \.\.\.>$")
    _ENDED = re.compile(r"^(\d+) +(\d+\.\d+) <\.\.\. (\w+) resumed>.* = 0 <(\d+\.\d+)>$")

    def __init__(self, pids: Iterable[int], folder: Path) -> None:
        self._pids = list(pids)
        self._output = folder / "strace.out"

    async def __aenter__(self) -> Trace | None:
        """Attach strace. Return None if this machine has no strace, or doesn't allow it."""
        if not self._pids or shutil.which("strace") is None:
            self._process = None
            return None
        attach = [part for pid in self._pids for part in ("-p", str(pid))]
        self._process = await asyncio.create_subprocess_exec(
            *("strace", "-f", "-ttt", "-T", "-y", "-e", f"trace={self.CALLS}", "-o", str(self._output), *attach),
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._process.stderr is not None
        attached = set[int]()
        while attached < set(self._pids):
            line = (await self._process.stderr.readline()).decode()
            if not line:
                return None
            if found := re.search(r"Process (\d+) attached", line):
                attached.add(int(found[1]) if int(found[1]) in self._pids else 0)
                attached.discard(0)
        self._drain = asyncio.ensure_future(self._process.stderr.read())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.terminate()  # strace detaches, and the traced processes continue
            await self._process.wait()

    def syncs(self) -> list[tuple[float, float, str]]:
        """Return the completed fsyncs: begin, end, and the file's name. Call this after the `async with` block."""
        found, begun = [], {}
        for line in self._output.read_text(encoding="utf-8", errors="replace").splitlines():
            if whole := self._WHOLE.match(line):
                began = float(whole[2])
                found.append((began, began + float(whole[6]), Path(whole[5] or "?").name))
            elif part := self._BEGUN.match(line):
                begun[part[1], part[3]] = (float(part[2]), Path(part[5] or "?").name)
            elif (end := self._ENDED.match(line)) and (end[1], end[3]) in begun:
                began, file = begun.pop((end[1], end[3]))
                found.append((began, float(end[2]), file))
        return found
