"""The items of a streamed call: each is passed on when it comes, recorded, and passed on again in a replay."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from autogen_core.models import CreateResult, LLMMessage

from durable_autogen.autogen.values import pieces_again, reply_again, value_again, written_piece, written_value
from durable_autogen.record.events import Content, GivenUp, Raised, Returned
from nexum_engine.deadline import heartbeat

HOLD_FOR = 0.5  # seconds to hold back a stream's newest piece, in case it is the last one

AskStreamed = Callable[[Sequence[LLMMessage]], AsyncIterator[str | CreateResult]]
"""A function that asks a model, and returns the stream of the reply's pieces and the reply."""


class Stream:
    """The items that a call yields before its result."""

    _write: Callable[[Any], Any] = staticmethod(written_value)

    def __init__(self) -> None:
        self.call = ""
        """The address of the tool call that yields the items."""
        self.items: asyncio.Queue[Any] = asyncio.Queue()
        self.passed_on: list[Any] = []
        self.produced: list[Any] = []
        """All items that a live call has produced, whether or not they were passed on."""

    def written(self, whole: bool) -> list[Any]:
        """Return the items as JSON: all that the call has produced, or (with False) those that were passed on."""
        return [self._write(item) for item in (self.produced if whole else self.passed_on)]


class ReplyStream(Stream):
    """The pieces of a streamed reply.

    The newest piece is held back: it may be the last one, which must wait until the reply is recorded.
    """

    _write = staticmethod(written_piece)

    def __init__(self) -> None:
        super().__init__()
        self.held: list[Any] = []
        """The piece that is held back; empty if there is none."""

    def _release(self) -> None:
        while self.held:
            self.items.put_nowait(self.held.pop())

    async def read(self, ask: AskStreamed, messages: Sequence[LLMMessage]) -> CreateResult:
        """Ask the model and read the pieces of its reply; return the reply.

        If no other piece comes within HOLD_FOR, the newest one is released.
        """
        loop = asyncio.get_running_loop()
        result: CreateResult | None = None
        releasing: asyncio.TimerHandle | None = None
        try:
            async for piece in ask(messages):
                heartbeat()
                if releasing is not None:
                    releasing.cancel()
                if isinstance(piece, CreateResult):
                    result = piece
                    continue
                self._release()
                self.held.append(piece)
                self.produced.append(piece)
                releasing = loop.call_later(HOLD_FOR, self._release)
        except BaseException:
            self._release()  # the stream broke: give the agent every piece that came
            raise
        finally:
            if releasing is not None:
                releasing.cancel()
        if result is None:
            raise RuntimeError("the model's stream ended without a result")
        return result

    def replay(self, content: Content) -> None:
        """Pass on the pieces of a recorded reply, and hold the last one back."""
        pieces: list[Any] = []
        if isinstance(content, Returned):
            pieces = pieces_again(content.streamed, reply_again(content.value))
            self.held.extend(pieces[-1:])
            del pieces[-1:]
        elif isinstance(content, (Raised, GivenUp)):
            pieces = [value_again(piece) for piece in content.streamed]
        for piece in pieces:
            self.items.put_nowait(piece)
