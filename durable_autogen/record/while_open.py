"""Changes to classes and modules: for the length of a `with`, or while at least one session is open."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any


@contextmanager
def replaced(holder: Any, name: str, wrapper: Callable[[Any], Any]) -> Iterator[None]:
    """For the length of a `with`, replace a function of a module, or a method of a class.

    `wrapper` gets the original, and returns the function that replaces it.
    """
    original = getattr(holder, name)
    setattr(holder, name, functools.wraps(original)(wrapper(original)))
    try:
        yield
    finally:
        setattr(holder, name, original)


def while_open(change: Callable[[], Iterator[None]]) -> Callable[[], AbstractContextManager[None]]:
    """Turn a generator, which makes a change and undoes it after its `yield`, into a context manager for sessions.

    The first open session makes the change, and the last open session undoes it, in whatever order they end.
    """
    lock = threading.Lock()
    undo = ExitStack()
    sessions = 0

    @contextmanager
    def shared() -> Iterator[None]:
        nonlocal sessions
        with lock:
            if sessions == 0:
                undo.enter_context(contextmanager(change)())
            sessions += 1
        try:
            yield
        finally:
            with lock:
                sessions -= 1
                if sessions == 0:
                    undo.close()

    return shared
