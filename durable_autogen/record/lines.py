"""Where the lines go that a person should read: to the logger `durable_autogen`, or to a function of the program's."""

from __future__ import annotations

import logging
from collections.abc import Callable

LOG = logging.getLogger("durable_autogen")


class _Teller(logging.Handler):
    def __init__(self, tell: Callable[[str], None], on_failure: Callable[[Exception], None]) -> None:
        super().__init__(logging.INFO)
        self._tell = tell
        self._on_failure = on_failure

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._tell(f"[Nexum] {record.getMessage()}")
        except Exception as error:  # noqa: BLE001 - the program's own function, or a console that is gone
            self._on_failure(error)


def log_for(tell: Callable[[str], None] | None, on_failure: Callable[[Exception], None]) -> logging.Logger:
    """Return the logger of a session: one that calls `tell` with each line, or the library's own.

    `on_failure` gets what `tell` raises: raised where the line is logged, it would look like a failure of that code.
    """
    if tell is None:
        return LOG
    logger = logging.Logger(LOG.name, logging.INFO)
    logger.addHandler(_Teller(tell, on_failure))
    return logger
