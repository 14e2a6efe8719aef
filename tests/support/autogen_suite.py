"""Run pytest with this script's arguments, and each asynchronous test inside its own durable session.

The variable SESSIONS holds the prefix of the sessions' ids, and NEXUM_ADDRESS holds the server's address. Without
SESSIONS the tests run without sessions. The last line of output is the number of live calls that reached AutoGen's
replay client.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

import pytest
from autogen_ext.models.replay import ReplayChatCompletionClient

SESSIONS = os.environ.get("SESSIONS", "")
asked_live = 0


def counted(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a wrapper of the method that counts its calls."""

    @functools.wraps(method)
    def called(*args: Any, **kwargs: Any) -> Any:
        global asked_live
        asked_live += 1
        return method(*args, **kwargs)

    return called


for name in ("create", "create_stream"):
    setattr(ReplayChatCompletionClient, name, counted(getattr(ReplayChatCompletionClient, name)))


def within_a_session(test: Callable[..., Any], session: str) -> Callable[..., Any]:
    """Return a wrapper that runs the test inside a session."""
    from durable_autogen import DurableSession

    @functools.wraps(test)
    async def inside(*args: Any, **kwargs: Any) -> Any:
        async with DurableSession(session):
            return await test(*args, **kwargs)

    return inside


def pytest_collection_modifyitems(items: list[Any]) -> None:
    for item in items:
        if SESSIONS and inspect.iscoroutinefunction(item.obj):
            digest = hashlib.sha256(item.nodeid.encode()).hexdigest()[:20]
            item.obj = within_a_session(item.obj, f"{SESSIONS}-{digest}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"asked live: {asked_live}")


if __name__ == "__main__":
    sys.exit(pytest.main(sys.argv[1:], plugins=[sys.modules[__name__]]))
