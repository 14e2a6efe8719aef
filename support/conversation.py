"""Print the messages and tool calls of a run's agents as they happen."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from support.console import say, say_piece


class Conversation:
    """A printer of one run's messages. `answerer` is the agent whose text is the answer; it is printed as [agent]."""

    def __init__(self, answerer: str) -> None:
        self._answerer = answerer
        self._is_streaming = False
        self.answered = False
        """Whether the run ended with an answer."""
        self.results = 0
        """The number of tool calls that returned a result."""
        self.failed = 0
        """The number of tool calls that failed."""

    async def show(self, items: AsyncGenerator[Any, None]) -> None:
        """Print the run's messages until the run ends."""
        from autogen_agentchat.messages import ModelClientStreamingChunkEvent

        try:
            async for item in items:
                if isinstance(item, ModelClientStreamingChunkEvent):
                    say_piece(item.content if self._is_streaming else f"\n{item.content}")
                    self._is_streaming = True
                    continue
                self._show(item)
                self._is_streaming = False
        finally:
            await items.aclose()

    def _show(self, item: Any) -> None:
        from autogen_agentchat.messages import TextMessage, ToolCallExecutionEvent, ToolCallRequestEvent

        source = getattr(item, "source", "")
        who = "agent" if source == self._answerer else source
        if isinstance(item, ToolCallRequestEvent):
            for call in item.content:
                say(f"[{who}] calls {call.name} {call.arguments}")
        elif isinstance(item, ToolCallExecutionEvent):
            for result in item.content:
                if result.is_error:
                    say(f"[{who}] {result.name} failed: {result.content}")
                    self.failed += 1
                else:
                    say(f"[{who}] {result.name} returned {len(result.content):,} characters")
                    self.results += 1
        elif isinstance(item, TextMessage) and source == self._answerer:
            self.answered = bool(item.content.strip())
            say("" if self._is_streaming else f"\n{item.content}\n")
        elif isinstance(item, TextMessage) and source != "user":
            say(f"[{who}] reports:\n{item.content}")
