"""Detection of unrecorded connections and processes, by Python's audit events.

If a program starts a connection or a process in a session, but outside a recorded call, every later run starts it
again. Python raises no audit event for a connection that a library makes without Python's socket module (uvloop, gRPC),
nor for a second request over an open connection.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from durable_autogen.record.place import current

_installed = False


def watch() -> None:
    """Install the audit hook once: it can't be removed. Outside a session, the hook only reads a variable."""
    global _installed
    if not _installed:
        _installed = True
        sys.addaudithook(_hook)


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if event not in _WHAT:
        return
    place = current.get()
    if place is None or place.in_call or place.session.is_over or _describes_machine():
        return
    place.session.left_the_record(place.agent, _WHAT[event](args))


def _describes_machine() -> bool:
    """Return whether a module of Python starts a process to find out about the machine, as platform.processor does.

    Vendors' clients send such facts with their requests.
    """
    frame = sys._getframe(2)  # the frame that raised the audit event
    while frame.f_globals.get("__name__") in ("subprocess", "os") and frame.f_back is not None:
        frame = frame.f_back
    return frame.f_globals.get("__name__") in ("platform", "ctypes.util", "uuid")


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
