"""The event loop of a server or worker process: uvloop's if it is installed, else asyncio's."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine
from typing import Any, TypeVar

CHOICE = "NEXUM_EVENT_LOOP"
"""With the value `asyncio`, this environment variable turns uvloop off."""

T = TypeVar("T")


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run `main` as asyncio.run does.

    With uvloop, a server and a worker need a fifth less CPU time for calls that are made one after the other.
    """
    if os.environ.get(CHOICE) != "asyncio":
        try:
            import uvloop
        except ImportError:
            pass
        else:
            return uvloop.run(main)
    return asyncio.run(main)
