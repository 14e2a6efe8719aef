"""Logging of progress and warnings: to the logger `durable_autogen`, or to a function of the program."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import datetime

LOG = logging.getLogger("durable_autogen")


def _ignore(_: Exception) -> None:
    """Ignore an error of `tell`: the program continues even if it can't show its progress."""


class Teller(logging.Handler):
    """A handler that calls `tell` with each line about progress, and `on_failure` with an error of `tell`."""

    def __init__(self, tell: Callable[[str], None], on_failure: Callable[[Exception], None] = _ignore) -> None:
        super().__init__(logging.INFO)
        self._tell = tell
        self._on_failure = on_failure

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._tell(f"[Nexum] {record.getMessage()}")
        except Exception as error:  # noqa: BLE001 - the program's function may raise anything
            self._on_failure(error)


def log_for(tell: Callable[[str], None] | None, on_failure: Callable[[Exception], None] = _ignore) -> logging.Logger:
    """Return a session's logger: it calls `tell` with each line. Without `tell`, return the library's logger.

    An error of `tell` is passed to `on_failure` and not raised. Otherwise, the code that logs a line would fail.
    """
    if tell is None:
        return LOG
    logger = logging.Logger(LOG.name, logging.INFO)
    logger.addHandler(Teller(tell, on_failure))
    return logger


def at_time(ms: int) -> str:
    """Return a time, in milliseconds since 1970, as text in local time."""
    return datetime.fromtimestamp(ms / 1000).strftime("%Y-%m-%d %H:%M:%S")
