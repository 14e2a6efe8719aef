"""How a server or worker process is told to stop: by a signal, or by the end of the process that started it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

ORPHAN_GRACE = 1.5  # seconds that a process whose parent is gone has to end in good order


def stop_event(*, until_stdin_closes: bool = False) -> asyncio.Event:
    """An event that is set by Ctrl+C or SIGTERM; a second one ends the process at once. Call it in the main thread.

    With `until_stdin_closes` the process belongs to the one that holds the other end of its standard input: it ends
    when that end closes, however its owner died, and leaves Ctrl+C to its owner.
    """
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def stop_soon() -> None:
        loop.call_soon_threadsafe(stop.set)

    handled = [signal.SIGTERM] if until_stdin_closes else [signal.SIGTERM, signal.SIGINT]

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        # Not KeyboardInterrupt: it would cancel what is under way, and that would be reported as a failure.
        for number in handled:
            signal.signal(number, signal.SIG_DFL)
        stop_soon()

    for number in handled:
        signal.signal(number, on_signal)
    if until_stdin_closes:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=_watch_stdin, args=(stop_soon,), name="parent watch", daemon=True).start()
    return stop


def _watch_stdin(stop_soon: Callable[[], None]) -> None:
    # The descriptor itself: a thread that waits inside sys.stdin would hold its lock when the interpreter ends.
    with contextlib.suppress(OSError):  # a connection that is reset is closed, too
        while os.read(0, 4096):
            pass
    deadline = threading.Timer(ORPHAN_GRACE, os._exit, args=(0,))
    deadline.daemon = True
    deadline.start()
    try:
        stop_soon()
    except RuntimeError:
        os._exit(0)  # the event loop is closed already
