"""What the tests of durable runs in this process share: models that word each reply differently, and how to run."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

from autogen_agentchat.base import TaskResult
from harness import Server
from openai_server import OpenAIServer, Reply

from durable_autogen import run_durable
from models.live import LiveModel

TIMEOUT = 20  # seconds in which everything here has ended, or hangs


def answer(text: str) -> Reply:
    """A reply that is never the same twice."""
    return Reply(f"{text} {random.random()}")


def client(model: OpenAIServer, name: str = "m") -> LiveModel:
    """The real client, pointed at the local server."""
    return LiveModel(vendor="OpenAI-compatible server", model=name, base_url=model.base_url, api_key="k")


async def run(server: Server, build: Callable[[], Any], task: Any = "Q", session: str = "s", **more: Any) -> TaskResult:
    """`run_durable`, which may not hang."""
    return await asyncio.wait_for(
        run_durable(build, task=task, session_id=session, nexum=server.address, **more), TIMEOUT
    )


def texts(result: TaskResult) -> list[str]:
    """What was said."""
    return [message.to_text() for message in result.messages]
