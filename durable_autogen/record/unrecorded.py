"""Detection of unrecorded connections and processes, by Python's audit events.

If a program starts a connection or a process in a session, but outside a recorded call, every later run starts it
again. Python raises no audit event for a connection that a library makes without Python's socket module (uvloop, gRPC),
nor for a second request over an open connection. It raises none for a process of multiprocessing and for a connection
of asyncio on Windows either, so these are detected where they are started.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from multiprocessing.process import BaseProcess
from typing import Any

from durable_autogen.record.place import current
from durable_autogen.record.while_open import replaced, while_open

_installed = False


def watch() -> None:
    """Install the audit hook once: it can't be removed. Outside a session, the hook only reads a variable."""
    global _installed
    if not _installed:
        _installed = True
        sys.addaudithook(_hook)


@while_open
def watched_without_events() -> Iterator[None]:
    """Detect what a program starts without an audit event."""
    with ExitStack() as stack:
        stack.enter_context(replaced(BaseProcess, "start", _start))
        if sys.platform == "win32":
            from asyncio.windows_events import IocpProactor

            stack.enter_context(replaced(IocpProactor, "connect", _connect))
        yield


def _start(original: Callable[[BaseProcess], None]) -> Callable[[BaseProcess], None]:
    def start(self: BaseProcess) -> None:
        _report("started a process with multiprocessing")
        original(self)

    return start


def _connect(original: Callable[[Any, Any, Any], Any]) -> Callable[[Any, Any, Any], Any]:
    def connect(self: Any, connection: Any, address: Any) -> Any:
        _report(_connected((connection, address)))
        return original(self, connection, address)

    return connect


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if event in _WHAT and not _is_pythons_own():
        _report(_WHAT[event](args))


def _report(what: str) -> None:
    place = current.get()
    if place is not None and not place.in_call and not place.session.is_over:
        place.session.left_the_record(place.agent, what)


def _is_pythons_own() -> bool:
    """Return whether a module of Python has raised the audit event for a purpose of its own.

    `platform` and others start processes to find out about the machine: vendors' clients send such facts with their
    requests. `multiprocessing.forkserver` connects to the server that forks the processes.
    """
    frame = sys._getframe(2)
    while frame.f_globals.get("__name__") in ("subprocess", "os") and frame.f_back is not None:
        frame = frame.f_back
    return frame.f_globals.get("__name__") in ("platform", "ctypes.util", "uuid", "multiprocessing.forkserver")


def _connected(args: tuple[Any, ...]) -> str:
    address = args[1]
    if isinstance(address, tuple) and len(address) >= 2:
        host, port = address[0], address[1]
        return f"connected to [{host}]:{port}" if ":" in str(host) else f"connected to {host}:{port}"
    return f"connected to {os.fsdecode(address) if isinstance(address, (bytes, str)) else address}"


def _started(args: tuple[Any, ...]) -> str:
    executable, argv = args[0], args[1]
    words: Sequence[Any] = [argv] if isinstance(argv, (str, bytes)) else list(argv or ())
    shown = " ".join(_word(word) for word in words) or _word(executable)
    return f"started {shown if len(shown) <= 80 else shown[:77] + '...'}"


def _ran(args: tuple[Any, ...]) -> str:
    return _started((args[0], args[0]))


def _word(value: Any) -> str:
    return os.fsdecode(value) if isinstance(value, (str, bytes, os.PathLike)) else str(value)


_WHAT = {
    "socket.connect": _connected,
    "subprocess.Popen": _started,
    "os.system": _ran,
}
