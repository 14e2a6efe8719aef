"""Real processes for the tests: servers, workers and scripts. The test that starts a process also ends it."""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from forking import Forked, can_fork, run_forked

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    # Add the folder for programs that pytest doesn't start. Pytest's own settings add it, too.
    sys.path.insert(0, str(ROOT))
MACHINES_CERTIFICATES = os.environ.get("SSL_CERT_FILE")
"""The file with the certificates that the machine trusts; None means the system's. The package index needs them."""
KILLED = (1, signal.SIGTERM) if sys.platform == "win32" else (-signal.SIGKILL,)
"""The exit codes of a killed process. On Windows, the killer chooses: `Popen.kill` gives 1, `os.kill` the signal."""
needs_links = pytest.mark.skipif(sys.platform == "win32", reason="a symbolic link needs a privilege on Windows")
PATIENCE = 110  # seconds that a process may take: less than pytest's limit for a test, so that the failure names it
MODEL_VARIABLES = (
    *("GEMINI_API_KEY", "OPENAI_API_KEY", "ANTHROPIC_API_KEY", "NEXUM_MODEL", "OPENAI_BASE_URL"),
    *("NEXUM_ADDRESS", "DATABASE_URL", "CRASH_AFTER", "NEXUM_ALLOWED_HOSTS"),
    *("NEXUM_TLS_CA", "NEXUM_TLS_CERT", "NEXUM_TLS_KEY", "NEXUM_TOKEN", "NEXUM_TOKEN_FILE"),
    *("NEXUM_SERVER_TLS_CERT", "NEXUM_SERVER_TLS_KEY", "NEXUM_SERVER_TLS_CLIENT_CA", "NEXUM_SERVER_TOKENS"),
)


@contextmanager
def trusting(certificates: str | None) -> Iterator[None]:
    """Let this process, and those that it starts, trust the certificates in this file. None means the system's."""
    with patch.dict(os.environ):
        os.environ.pop("SSL_CERT_FILE", None)
        if certificates is not None:
            os.environ["SSL_CERT_FILE"] = certificates
        yield


def free_port() -> int:
    """Return a port without a listener."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def environment(changes: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment with `changes`, without the variables that select a model, server or database."""
    base = {name: value for name, value in os.environ.items() if name not in MODEL_VARIABLES}
    own = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    if sys.platform == "win32":
        own["PYTHONIOENCODING"] = "utf-8"  # otherwise a code page that lacks some characters of the output
    return {**base, **own, **(changes or {})}


class Process:
    """A child process. A thread reads its output.

    With `forked`, the process need not import its modules (forking.py): for tests that aren't about a process's start.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        cwd: Path,
        env: Mapping[str, str] | None = None,
        program: str | Path = sys.executable,
        forked: bool = False,
    ) -> None:
        self.popen: subprocess.Popen[str] | Forked
        if forked and can_fork(command, environment(env)):
            self.popen = Forked(command, cwd=cwd, env=environment(env))
        else:
            self.popen = subprocess.Popen(
                [program, *command],
                cwd=cwd,
                env=environment(env),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                encoding="utf-8",
                errors="replace",
            )
        self.lines: list[str] = []
        self._new: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self._new.put(line.rstrip("\n"))
        self._new.put(None)

    def wait_for(self, text: str, *, timeout: float = 30) -> str:
        """Return the next line that contains `text`. Raises AssertionError if the process ends or the time is up."""
        while True:
            try:
                line = self._new.get(timeout=timeout)
            except queue.Empty:
                raise AssertionError(f"no {text!r} within {timeout:g} s in:\n{self.output}") from None
            if line is None:
                self._new.put(None)
                raise AssertionError(f"the process ended without {text!r}:\n{self.output}")
            self.lines.append(line)
            if text in line:
                return line

    def wait_for_address(self) -> str:
        """Wait until the process, which is a server, is ready for calls; return its address."""
        return self.wait_for("Nexum engine").split(" on ")[1].split(",")[0]

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def wait(self, timeout: float = 60) -> int:
        """Wait for the end of the process and of its output; return the exit code."""
        code = self.popen.wait(timeout)
        while (line := self._new.get(timeout=10)) is not None:
            self.lines.append(line)
        self._new.put(None)
        return code

    def kill(self) -> None:
        """Send SIGKILL (TerminateProcess on Windows), and wait for the end."""
        self.popen.kill()
        self.popen.wait(10)

    def interrupt(self) -> None:
        """Send SIGINT, as Ctrl+C does. On Windows, skip the test: there, Ctrl+C can't be sent to only one process."""
        if sys.platform == "win32":
            pytest.skip("Windows can't send Ctrl+C to only one process")
        else:
            self.popen.send_signal(signal.SIGINT)

    def terminate(self) -> None:
        """Send SIGTERM. On Windows, skip the test: there, a process can't catch SIGTERM."""
        if sys.platform == "win32":
            pytest.skip("Windows has no SIGTERM that a process can catch")
        else:
            self.popen.terminate()

    def end(self) -> None:
        """Kill the process if it still runs, and close its output."""
        if self.popen.poll() is None:
            self.kill()
        if self.popen.stdout is not None:
            self.popen.stdout.close()


@contextmanager
def running(
    command: Sequence[str],
    *,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    program: str | Path = sys.executable,
    forked: bool = False,
) -> Iterator[Process]:
    """Run a process for the length of a `with`."""
    process = Process(command, cwd=cwd, env=env, program=program, forked=forked)
    try:
        yield process
    finally:
        process.end()


def run_to_end(
    command: Sequence[str], *, cwd: Path, env: Mapping[str, str] | None = None, forked: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run a process to its end; return its exit code, its output and, separately, its errors."""
    env = environment(env)
    if forked and can_fork(command, env):
        return run_forked(command, cwd=cwd, env=env, timeout=PATIENCE)
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def sqlite_url(folder: Path) -> str:
    """Return the URL of a folder's database."""
    return f"sqlite:///{folder / 'nexum.db'}"


url_of: Callable[[Path], str] = sqlite_url
"""The function that returns the URL of a folder's database. POSTGRES_TESTS=all replaces it (conftest.py)."""


@contextmanager
def nexum_server(
    folder: Path,
    *,
    database_url: str = "",
    port: int = 0,
    lease: float = 30.0,
    arguments: Sequence[str] = (),
) -> Iterator[Server]:
    """Run a server process, by default on the folder's database; yield it when it is ready for calls.

    With port 0, the server takes a free port itself.
    """
    command = [
        *("-m", "nexum_engine", "--listen", f"127.0.0.1:{port}", "--lease", str(lease)),
        *("--database-url", database_url or url_of(folder), *arguments),
    ]
    with running(command, cwd=folder, forked=True) as process:
        yield Server(process, process.wait_for_address())


class Server:
    """A running server process and its address."""

    def __init__(self, process: Process, address: str) -> None:
        self.process = process
        self.address = address

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])


@contextmanager
def published_server(folder: Path, *, take_back_after: float = 60.0) -> Iterator[str]:
    """Run the stand-in for a published Nexum server (published_server.py) in `folder`; yield its address."""
    host = "[::1]" if _has_ipv6() else "127.0.0.1"
    program = str(ROOT / "tests" / "support" / "published_server.py")
    command = [program, "--listen", f"{host}:0", "--take-back-after", str(take_back_after)]
    with running(command, cwd=folder) as process:
        yield process.wait_for("Published Nexum on").rpartition(" ")[2].replace(host, "localhost")


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as listener:
            listener.bind(("::1", 0))
    except OSError:
        return False
    return True


@contextmanager
def connected_worker(command: Sequence[str], folder: Path) -> Iterator[Process]:
    """Run a worker process; yield it when it is connected to the server."""
    with running(command, cwd=folder, forked=True) as process:
        process.wait_for("connected to")
        yield process


def tool_worker(folder: Path, address: str) -> AbstractContextManager[Process]:
    """Run a worker.py that is connected to the server."""
    return connected_worker([str(ROOT / "worker.py"), "--nexum", address], folder)


@contextmanager
def logged(lines: list[str], name: str = "durable_autogen") -> Iterator[None]:
    """Add the messages of a library's logger, from level INFO on, to `lines`."""

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    collector = Collector(logging.INFO)
    logger = logging.getLogger(name)
    level = logger.level
    logger.addHandler(collector)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(collector)
        logger.setLevel(level)


async def cancelled_at_each_await(task: asyncio.Task[Any]) -> int:
    """Cancel a task until it has ended, as a cancel scope of anyio does; return how often it was cancelled."""
    times = 0
    while not task.done():
        times += task.cancel()
        await asyncio.sleep(0)
    assert task.cancelled()
    return times
