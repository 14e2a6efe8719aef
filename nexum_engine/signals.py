"""Stop requests to a server or worker process: a signal, or the end of the process that started it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

ORPHAN_GRACE = 1.5  # seconds to stop cleanly after the parent process has ended


def stop_event(*, until_stdin_closes: bool = False) -> asyncio.Event:
    """Return an event that Ctrl+C or SIGTERM sets. A second signal ends the process at once.

    With `until_stdin_closes`, Ctrl+C is ignored, because the parent process handles it. Instead of Ctrl+C, the end of
    standard input sets the event. Standard input closes when the parent process ends, even if that process is killed.

    Call this function in the main thread.
    """
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def stop_soon() -> None:
        loop.call_soon_threadsafe(stop.set)

    handled = [signal.SIGTERM] if until_stdin_closes else [signal.SIGTERM, signal.SIGINT]

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        # Don't raise KeyboardInterrupt: it would cancel running tasks, and the worker would report them as failed.
        for number in handled:
            # Linux ignores a signal for which the first process of a container has no handler.
            signal.signal(number, _end_at_once if os.getpid() == 1 else signal.SIG_DFL)
        stop_soon()

    for number in handled:
        signal.signal(number, on_signal)
    if until_stdin_closes:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        when_stdin_closes(lambda: _end_orphan(stop_soon))
    return stop


def when_stdin_closes(act: Callable[[], None]) -> None:
    """Call a function when standard input closes: that shows that the parent process has ended."""

    def watch() -> None:
        # Read the file descriptor. A thread that reads from sys.stdin holds its lock, and Python needs that lock at
        # exit.
        with contextlib.suppress(OSError):  # a connection that was reset counts as closed
            while os.read(0, 4096):
                pass
        act()

    threading.Thread(target=watch, name="parent watch", daemon=True).start()


def _end_at_once(number: int, _frame: FrameType | None) -> None:
    os._exit(128 + number)


def _end_orphan(stop_soon: Callable[[], None]) -> None:
    deadline = threading.Timer(ORPHAN_GRACE, os._exit, args=(0,))
    deadline.daemon = True
    deadline.start()
    try:
        stop_soon()
    except RuntimeError:
        os._exit(0)  # `stop_soon` found the event loop closed: the process is ending
