"""Fork the tests' processes from one process that has the slow modules imported: each start takes a tenth of the time.

A forked process is a real process: it has a process id, signals and an exit code, and it ends as any Python does. Only
its imports were made before, and its end leaves the imported modules alone: to destroy them takes ten times as long as
to fork the process. So don't fork a process if the test is about the process's start, or about these modules' end.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, TextIO

IMPORTED = (
    *("nexum_engine.maintenance", "nexum_engine.commands", "nexum_engine.server", "nexum_engine.worker"),
    *("submit_task", "pipeline_workflow", "support.tool_calls", "support.offline.web", "support.tools.web.live"),
    *("durable_autogen", "autogen_agentchat.teams", "autogen_agentchat.ui", "autogen_ext.models.openai"),
)
"""What the forking process imports: each is slow, and a program of the tests needs it."""
KEPT: dict[str, object] = {}
"""The modules that a forked process doesn't destroy at its end, by name."""
MAX_CHARACTERS = 2**15  # in the arguments and the environment of a forked process
MAX_ORDER = 8 * MAX_CHARACTERS  # bytes


def can_fork(command: Sequence[str], env: Mapping[str, str]) -> bool:
    """Return whether a process of this command and environment may be forked.

    Code after `-c` and the settings of Python, its locale and gRPC take effect in a new interpreter only. Very long
    arguments can't be sent to the process that forks.
    """
    if sum(map(len, [*command, *env, *env.values()])) > MAX_CHARACTERS:
        return False
    changed = {name for name in {*env, *_environment()} if env.get(name) != _environment().get(name)}
    return (
        _has_pidfd()
        and command[0] != "-c"
        and not any(name.startswith(("PYTHON", "LC_", "LANG", "GRPC_")) for name in changed)
    )


@cache
def _has_pidfd() -> bool:
    """Return whether the system has file descriptors of processes: Linux has them, unless a container forbids them."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):
        return False
    return True


@cache
def _environment() -> dict[str, str]:
    from harness import environment

    return environment()


# ---- In the test's process -------------------------------------------------------------------------------------------


class Forked:
    """A forked process, with those attributes of `subprocess.Popen` that the tests use."""

    def __init__(self, command: Sequence[str], *, cwd: Path, env: Mapping[str, str], own_errors: bool = False) -> None:
        """Fork the process. With `own_errors`, `stderr` is a pipe of its own; otherwise it goes to `stdout`."""
        reading, output = os.pipe()
        reading_errors, errors = os.pipe() if own_errors else (None, output)
        self._status, status = os.pipe()
        order = json.dumps({"command": [*command], "cwd": str(cwd), "env": dict(env)}).encode()
        assert len(order) <= MAX_ORDER, f"the arguments and the environment have {len(order)} bytes: don't fork"
        try:
            self.pid = _forking_process().start(order, [output, errors, status])
        finally:
            for descriptor in {output, errors, status}:
                os.close(descriptor)
        self.stdout = _text_of(reading)
        self.stderr = None if reading_errors is None else _text_of(reading_errors)
        self.returncode: int | None = None
        self._ended = threading.Event()
        threading.Thread(target=self._wait_for_end, daemon=True).start()

    def _wait_for_end(self) -> None:
        with open(self._status, encoding="ascii") as status:
            self.returncode = int(status.read())
        self._ended.set()

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal; None while the process runs."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end, and return the exit code. Raises TimeoutExpired."""
        if not self._ended.wait(timeout):
            raise subprocess.TimeoutExpired("a forked process", timeout or 0)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _text_of(descriptor: int) -> TextIO:
    return open(descriptor, encoding="utf-8", errors="replace")


def run_forked(
    command: Sequence[str], *, cwd: Path, env: Mapping[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """Run a forked process to its end, as `subprocess.run` does; return its exit code, output and errors."""
    process = Forked(command, cwd=cwd, env=env, own_errors=True)
    assert process.stderr is not None
    with process.stdout, process.stderr, ThreadPoolExecutor(2) as reading:
        output, errors = reading.submit(process.stdout.read), reading.submit(process.stderr.read)
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        return subprocess.CompletedProcess(command, code, output.result(), errors.result())


class _ForkingProcess:
    """The process that forks, and the connection to it. It ends when the connection is closed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,  # a pipe, as in the forked processes
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                text=True,
            )
        atexit.register(self._process.wait)  # runs after the next line's function
        atexit.register(self._connection.close)

    def start(self, order: bytes, descriptors: list[int]) -> int:
        """Fork a process; return its id."""
        with self._lock:
            socket.send_fds(self._connection, [order], descriptors)
            answer = self._connection.recv(100)
        assert answer, f"the process that forks has ended:\n{self._process.communicate()[0]}"
        return int(answer)


@cache
def _forking_process() -> _ForkingProcess:
    return _ForkingProcess()


# ---- In the process that forks ---------------------------------------------------------------------------------------


def serve(connection: socket.socket) -> dict[str, Any] | None:
    """Fork a process for each order, and report its end. Return the order in the forked process, None at the end."""
    ends: dict[int, tuple[int, int]] = {}  # by the descriptor of a process: its id, and where to report its end
    while True:
        ready, _, _ = select.select([connection.fileno(), *ends], [], [])
        for process in ends.keys() & set(ready):
            pid, status = ends.pop(process)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            os.write(status, str(code).encode())
            _close(process, status)
        if connection.fileno() in ready:
            order, descriptors, _, _ = socket.recv_fds(connection, MAX_ORDER, 3)
            if not order:
                return None
            output, errors, status = descriptors
            pid = os.fork()
            if pid == 0:
                connection.close()
                _close(status, *(one for process, (_, other) in ends.items() for one in (process, other)))
                return {**json.loads(order), "output": output, "errors": errors}
            ends[os.pidfd_open(pid)] = pid, status
            _close(output, errors)
            connection.send(str(pid).encode())


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def run(command: list[str], cwd: str, env: dict[str, str], output: int, errors: int) -> None:
    """Run a script, or a module after `-m`, in a forked process. Like Python, raise what the program raises."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(output, 1)
    os.dup2(errors, 2)
    _close(output, errors)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    # By default, a forked process uses no grpcio. Use it here, as in a program that isn't forked. This is safe,
    # because the parent has made no gRPC call.
    channel._is_forked = False
    if command[0] == "-m":
        sys.argv = ["-m", *command[2:]]
        sys.path[0] = cwd
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        sys.path[0] = str(Path(command[0]).absolute().parent)
        runpy.run_path(command[0], run_name="__main__")


def keep_modules() -> None:
    """Make the kept modules unknown to the end of Python, which destroys all modules that it knows."""
    for name in KEPT:
        sys.modules.pop(name, None)


def main() -> None:
    """Serve on the socket with the number that is this process's argument."""
    atexit.register(keep_modules)  # the function that is registered first is called last
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C is for the tests
    gc.disable()
    for name in IMPORTED:
        importlib.import_module(name)
    KEPT.update({name: module for name, module in sys.modules.items() if name not in ("__main__", "builtins", "sys")})
    KEPT[""] = KEPT  # nothing frees a cycle that the garbage collection doesn't see
    gc.freeze()
    order = serve(socket.socket(fileno=int(sys.argv[1])))
    if order is not None:
        gc.enable()
        run(**order)


if __name__ == "__main__":
    from nexum_engine import channel

    main()
