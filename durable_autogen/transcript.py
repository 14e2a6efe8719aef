"""What a run's messages are called: the same in every replay.

AutoGen gives each message a random id and the time at which it was made. Here both follow from the record: the id from
session, agent and position, the time from the last recorded event before it. So a session that is run again ends in the
same transcript, and a program that keeps messages by their id keeps each of them once.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from datetime import datetime, timezone
from typing import Any

from autogen_agentchat.base import Response, TaskResult
from autogen_agentchat.messages import (
    BaseAgentEvent,
    BaseChatMessage,
    ModelClientStreamingChunkEvent,
    UserInputRequestedEvent,
)

from durable_autogen.recorder import Recorder

Message = BaseAgentEvent | BaseChatMessage
Item = Message | TaskResult
RunStream = Callable[..., AsyncGenerator[Item, None]]
Task = str | BaseChatMessage | Sequence[BaseChatMessage] | None

REPLAYED = "nexum"
"""The key in a streamed message's metadata whose value is "replayed" if the message came from the record."""

_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_DNS, "durable_autogen.invalid")


class Transcript:
    """The messages of one session, in their order."""

    def __init__(self, recorder: Recorder, was_replayed: Callable[[str], bool]) -> None:
        self._recorder = recorder
        self._was_replayed = was_replayed
        self._ids: dict[str, str] = {}
        self._count: Counter[tuple[str, str]] = Counter()
        self._settled: dict[int, tuple[Message, Message]] = {}
        self._made: dict[int, tuple[Message, int]] = {}

    def noting(self, stream: Callable[..., AsyncGenerator[Any, None]]) -> Callable[..., AsyncGenerator[Any, None]]:
        """The same stream of a part of the team; how far the session was is noted where a message is made: an agent
        that is a tool hands each on only when its next one comes."""

        async def noted(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
            async for item in stream(*args, **kwargs):
                made = [item.chat_message, *(item.inner_messages or ())] if isinstance(item, Response) else [item]
                # A streamed piece has no time of its own.
                for one in (one for one in made if not isinstance(one, ModelClientStreamingChunkEvent)):
                    self._made.setdefault(id(one), (one, self._recorder.last_recorded_ms))
                yield item

        return noted

    def settling(self, run_stream: RunStream) -> RunStream:
        """An agent's or a team's `run_stream` whose messages have their lasting ids and times; what came from the
        record says so."""

        async def settled(*, task: Task = None, **more: Any) -> AsyncGenerator[Item, None]:
            await self._recorder.begin()
            given = messages_of(task)
            async for item in run_stream(task=task, **more):
                if isinstance(item, TaskResult):
                    yield self._result(item)
                    continue
                message = self._message(item, given)
                yield _marked(message) if self._was_replayed(item.source) else message

        return settled

    def _message(self, message: Message, given: Sequence[BaseChatMessage]) -> Message:
        """A copy with its lasting id and time; what the caller has set in a `given` message stays."""
        if isinstance(message, ModelClientStreamingChunkEvent):
            whole = message.full_message_id
            return message.model_copy(update={"full_message_id": whole and self._id(message.source, whole, "streamed")})
        kept = message.model_fields_set if any(message is one for one in given) else set()
        _, made_ms = self._made.get(id(message), (message, self._recorder.last_recorded_ms))
        lasting = {
            "id": self._id(message.source, message.id, "message"),
            "created_at": datetime.fromtimestamp(made_ms / 1000, timezone.utc),
        }
        copied = in_result = message.model_copy(
            update={name: value for name, value in lasting.items() if name not in kept}
        )
        if isinstance(message, UserInputRequestedEvent):
            # Only in the result: who answers the streamed one needs the id that AutoGen waits for.
            lasting_id = self._id(message.source, message.request_id, "request")
            in_result = copied.model_copy(update={"request_id": lasting_id})
        # Both are kept, so that the id of neither is another object's while the run lasts.
        self._settled[id(message)] = (message, in_result)
        return copied

    def _result(self, result: TaskResult) -> TaskResult:
        """The same result with the settled messages."""
        messages = [
            self._settled[id(message)][1] if id(message) in self._settled else message for message in result.messages
        ]
        return TaskResult(messages=messages, stop_reason=result.stop_reason)

    def _id(self, source: str, given: str, kind: str) -> str:
        if given not in self._ids:
            self._count[source, kind] += 1
            # A streamed message's id is met before the message, and only where there was something to stream.
            place = (
                f"{self._recorder.journal.session}/{self._recorder.epoch}/{source}/{kind}/{self._count[source, kind]}"
            )
            self._ids[given] = str(uuid.uuid5(_NAMESPACE, place))
        return self._ids[given]


def messages_of(task: Task) -> list[BaseChatMessage]:
    """The messages that the caller has made."""
    if task is None or isinstance(task, str):
        return []
    return [task] if isinstance(task, BaseChatMessage) else list(task)


def _marked(message: Message) -> Message:
    return message.model_copy(update={"metadata": {REPLAYED: "replayed", **message.metadata}})
