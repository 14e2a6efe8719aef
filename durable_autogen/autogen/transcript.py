"""What a run's messages are called: the same in every replay.

AutoGen gives each message a random id and the current time. Inside a session both follow from the record: the id from
session, agent and position, the time from the last event that was delivered before the message was made. They are set
where an agent passes a message on, before anybody else sees it.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from autogen_agentchat.base import Response, TaskResult
from autogen_agentchat.messages import (
    BaseAgentEvent,
    BaseChatMessage,
    ModelClientStreamingChunkEvent,
    UserInputRequestedEvent,
)

if TYPE_CHECKING:
    from durable_autogen.record.recorder import Recorder

Message = BaseAgentEvent | BaseChatMessage
Item = Message | TaskResult
Task = str | BaseChatMessage | Sequence[BaseChatMessage] | None

REPLAYED = "nexum"
"""The key in a streamed message's metadata whose value is "replayed" if the message came from the record."""

_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_DNS, "durable_autogen.invalid")


class Transcript:
    """The messages of one session."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._lasting: dict[str, str] = {}
        """The lasting id for each random one."""
        self._done: set[str] = set()
        """The lasting ids that were given."""
        self._count: Counter[tuple[str, str]] = Counter()
        self._requests: dict[str, str] = {}

    def settle(
        self, agent: str, item: Any, given: Sequence[BaseChatMessage] = (), *, made_before: bool = False
    ) -> None:
        """Set the lasting id and time of what an agent passes on; what the caller has set in a `given` one stays.

        What was `made_before` is a message from the record: it has its time, and its id is the next one.
        """
        for message in _messages_in(item):
            if isinstance(message, ModelClientStreamingChunkEvent):
                if message.full_message_id and message.full_message_id not in self._done:
                    _set(message, full_message_id=self._id(agent, message.full_message_id, "streamed"))
                continue
            if isinstance(message, UserInputRequestedEvent) and message.request_id not in self._requests:
                self._requests[message.request_id] = self._id(agent, message.request_id, "request")
            if message.id in self._done:
                continue
            kept = message.model_fields_set if any(message is one for one in given) else set()
            if "id" not in kept:
                _set(message, id=self._id(agent, message.id, f"message/{message.source}"))
            self._done.add(message.id)
            if "created_at" not in kept and not made_before:
                _set(message, created_at=datetime.fromtimestamp(self._recorder.last_recorded_ms / 1000, timezone.utc))

    def result(self, result: TaskResult) -> TaskResult:
        """Return the result with the lasting ids of requests; who answers one needs the random id until then."""
        if not any(isinstance(message, UserInputRequestedEvent) for message in result.messages):
            return result
        messages = [
            message.model_copy(update={"request_id": self._requests.get(message.request_id, message.request_id)})
            if isinstance(message, UserInputRequestedEvent)
            else message
            for message in result.messages
        ]
        return result.model_copy(update={"messages": messages})

    def _id(self, agent: str, given: str, kind: str) -> str:
        if given not in self._lasting:
            # A streamed message's id is met before the message, and only where there was something to stream.
            self._count[agent, kind] += 1
            number = self._count[agent, kind]
            place = f"{self._recorder.journal.session}/{self._recorder.programs}/{agent}/{kind}/{number}"
            self._lasting[given] = str(uuid.uuid5(_NAMESPACE, place))
            self._done.add(self._lasting[given])
        return self._lasting[given]


def _set(message: Message, **values: Any) -> None:
    # Not by setattr: a field that the caller has set is told from one that has its default.
    vars(message).update(values)


def _messages_in(item: Any) -> Iterable[Message]:
    if isinstance(item, Response):
        return [*(item.inner_messages or ()), item.chat_message]
    if isinstance(item, TaskResult):
        return item.messages
    return [item] if isinstance(item, (BaseAgentEvent, BaseChatMessage)) else []


def messages_of(task: Task) -> list[BaseChatMessage]:
    """Return the messages that the caller has made."""
    if task is None or isinstance(task, str):
        return []
    return [task] if isinstance(task, BaseChatMessage) else list(task)


def marked(message: Message) -> Message:
    """Copy a message, marked as replayed."""
    return message.model_copy(update={"metadata": {REPLAYED: "replayed", **message.metadata}})
