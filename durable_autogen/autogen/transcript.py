"""Message ids and times that are the same in every replay.

AutoGen gives each message a random id and the current time. A session replaces both when an agent passes the message
on, before any other code sees the message. The lasting id is made from the session, the agent and a count of the
agent's messages. (The messages that a tool streams are counted for each call.) The lasting time is the time of the last
event delivered before the message.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from typing import Any

from autogen_agentchat.base import Response, TaskResult
from autogen_agentchat.messages import (
    BaseAgentEvent,
    BaseChatMessage,
    ModelClientStreamingChunkEvent,
    UserInputRequestedEvent,
)

from durable_autogen.record.recorder import Recorder

Message = BaseAgentEvent | BaseChatMessage
Item = Message | TaskResult
Task = str | BaseChatMessage | Sequence[BaseChatMessage] | None

REPLAYED = "nexum"
"""The metadata key that marks a streamed message as replayed. Its value is "replayed"."""

_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_DNS, "durable_autogen.invalid")


class Transcript:
    """The ids and times of one session's messages."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._lasting: dict[str, str] = {}
        """The lasting id that replaces each random id."""
        self._done: set[str] = set()
        """The lasting ids in use."""
        self._count: Counter[tuple[str, str]] = Counter()

    def settle(
        self, maker: str, item: Any, given: Sequence[BaseChatMessage] = (), *, made_before: bool = False
    ) -> None:
        """Set the lasting ids and times of the messages that `maker` passes on: an agent, or a tool call that streams.

        `given` holds the messages of the caller's task: an id or time that the caller has set is kept. With
        `made_before`, the messages come from the record and keep their times.
        """
        for message in _messages_in(item):
            if isinstance(message, ModelClientStreamingChunkEvent):
                if message.full_message_id and message.full_message_id not in self._done:
                    _set(message, full_message_id=self._id(maker, message.full_message_id, "streamed"))
                continue
            if isinstance(message, UserInputRequestedEvent):
                self._id(maker, message.request_id, "request")  # `result` sets it
            if message.id in self._done:
                continue
            kept = message.model_fields_set if any(message is one for one in given) else set()
            if "id" not in kept:
                _set(message, id=self._id(maker, message.id, f"message/{message.source}"))
            self._done.add(message.id)
            if "created_at" not in kept and not made_before:
                recorded_ms = self._recorder.replay.last_recorded_ms
                _set(message, created_at=datetime.fromtimestamp(recorded_ms / 1000, timezone.utc))

    def result(self, result: TaskResult) -> TaskResult:
        """Return a run's result with lasting ids in its input requests.

        The ids are replaced only at the run's end, because AutoGen needs the random ids while the run lasts.
        """
        if not any(isinstance(message, UserInputRequestedEvent) for message in result.messages):
            return result
        messages = [
            message.model_copy(update={"request_id": self._lasting.get(message.request_id, message.request_id)})
            if isinstance(message, UserInputRequestedEvent)
            else message
            for message in result.messages
        ]
        return result.model_copy(update={"messages": messages})

    def _id(self, maker: str, given: str, kind: str) -> str:
        if given not in self._lasting:
            # Count each kind separately. A streamed message gets its number at its first piece. Any other message gets
            # its number when it is passed on. With one counter, the numbers would depend on which of these two moments
            # comes first.
            self._count[maker, kind] += 1
            number = self._count[maker, kind]
            place = f"{self._recorder.journal.session}/{self._recorder.program_number}/{maker}/{kind}/{number}"
            self._lasting[given] = str(uuid.uuid5(_NAMESPACE, place))
            self._done.add(self._lasting[given])
        return self._lasting[given]


def _set(message: Message, **values: Any) -> None:
    # Don't use setattr: pydantic would mark the field as set by the caller.
    vars(message).update(values)


def _messages_in(item: Any) -> Iterable[Message]:
    if isinstance(item, Response):
        return [*(item.inner_messages or ()), item.chat_message]
    if isinstance(item, TaskResult):
        return item.messages
    return [item] if isinstance(item, (BaseAgentEvent, BaseChatMessage)) else []


def messages_of(task: Any) -> list[BaseChatMessage]:
    """Return the messages of a task; an empty list if the task is a text or None."""
    if isinstance(task, BaseChatMessage):
        return [task]
    if isinstance(task, str) or not isinstance(task, Sequence):
        return []
    return [one for one in task if isinstance(one, BaseChatMessage)]


def marked(message: Message) -> Message:
    """Return a copy of a message, marked as replayed."""
    return message.model_copy(update={"metadata": {REPLAYED: "replayed", **message.metadata}})
