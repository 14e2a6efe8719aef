"""A model, live or offline, for an agent of a graph. It logs its calls and can be interrupted at one of them."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from autogen_core import FunctionCall
from autogen_core.models import CreateResult, LLMMessage, SystemMessage

from support.graphflow.graphs import APPROVED, REVISE, REVISIONS
from support.models import ModelChoice
from support.offline.model import OfflineModel

LATENCY = 0.05  # seconds that an offline reply takes
_DRAFT = "Draft"
_OPENINGS = {"author": _DRAFT, "planner": "Plan", "publisher": "Published"}


class WatchedModel(OfflineModel):
    """A model that logs each call and replies. Before reply number `at_reply`, it awaits `interrupt`, if given."""

    def __init__(
        self, agent: str, model: ModelChoice, log: Path, at_reply: int, interrupt: Callable[[], Awaitable[None]] | None
    ) -> None:
        super().__init__()
        self._agent = agent
        self._live = None if model.offline else model.client()
        self._log = log
        self._at_reply = at_reply
        self._interrupt = interrupt
        self._calls = 0

    async def create(self, messages: Sequence[LLMMessage], **options: Any) -> CreateResult:
        """Log the call, await `interrupt` if its time has come, and return the reply."""
        self._calls += 1
        with self._log.open("a", encoding="utf-8") as file:
            file.write(f"{self._agent}\n")
        if self._calls == self._at_reply and self._interrupt is not None:
            await self._interrupt()
        if self._live is not None:
            return await self._live.create(messages, **options)
        await asyncio.sleep(LATENCY)
        return await super().create(messages, **options)

    async def close(self) -> None:
        """Close the live model's client."""
        if self._live is not None:
            await self._live.close()

    def _respond(self, messages: Sequence[LLMMessage], offered: set[str]) -> str | list[FunctionCall]:
        # Add a random token, so that no two replies are equal. If a call is repeated, the output then shows it.
        token = secrets.token_hex(3)
        if self._agent == "reviewer":
            said = [str(message.content) for message in messages if not isinstance(message, SystemMessage)]
            drafts = sum(text.startswith(_DRAFT) for text in said)
            return f"{REVISE}: shorter, please ({token})" if drafts <= REVISIONS else f"{APPROVED} ({token})"
        opening = _OPENINGS.get(self._agent, f"The {self._agent}'s words")
        return f"{opening} {token}: the same key, the same effect, once."
