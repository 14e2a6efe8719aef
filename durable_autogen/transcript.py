"""What a run's messages are called: the same in every replay.

AutoGen gives each message a random id and the time at which it was made. Here both follow from the record: the id from
session, agent and position, the time from the last recorded event before it. So a session that is run again ends in the
same transcript, and a program that keeps messages by their id keeps each of them once.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timezone

from autogen_agentchat.base import TaskResult
from autogen_agentchat.messages import BaseAgentEvent, BaseChatMessage, ModelClientStreamingChunkEvent

from durable_autogen.recorder import Recorder

Message = BaseAgentEvent | BaseChatMessage

REPLAYED = "nexum"
"""The key in a streamed message's metadata whose value is "replayed" if the message came from the record."""

_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_DNS, "durable_autogen.invalid")


class Transcript:
    """The messages of one run, in their order."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._ids: dict[str, str] = {}
        self._count: Counter[tuple[str, str]] = Counter()
        self._settled: dict[int, tuple[Message, Message]] = {}

    def settled(self, message: Message, *, given: Sequence[BaseChatMessage] = ()) -> Message:
        """A copy with its lasting id and time; what the caller has set in a `given` message stays."""
        if isinstance(message, ModelClientStreamingChunkEvent):
            whole = message.full_message_id
            return message.model_copy(update={"full_message_id": whole and self._id(message.source, whole, "streamed")})
        kept = message.model_fields_set if any(message is one for one in given) else set()
        lasting = {
            "id": self._id(message.source, message.id, "message"),
            "created_at": datetime.fromtimestamp(self._recorder.last_recorded_ms / 1000, timezone.utc),
        }
        copied = message.model_copy(update={name: value for name, value in lasting.items() if name not in kept})
        # Both are kept, so that the id of neither is another object's while the run lasts.
        self._settled[id(message)] = (message, copied)
        return copied

    def result(self, result: TaskResult) -> TaskResult:
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


def marked(message: Message) -> Message:
    """A copy that says that it came from the record."""
    return message.model_copy(update={"metadata": {REPLAYED: "replayed", **message.metadata}})
