"""Conditions that end a team's run by something outside: in a replay they end it where they have ended the run."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

from autogen_agentchat import conditions
from autogen_agentchat.base import AndTerminationCondition, OrTerminationCondition, TerminationCondition
from autogen_agentchat.conditions import TimeoutTermination
from autogen_agentchat.messages import StopMessage

from durable_autogen.autogen.values import value_again, written_value
from durable_autogen.autogen.work import Work
from durable_autogen.record.events import Call, Kind, Returned
from durable_autogen.record.place import Place
from durable_autogen.record.recorder import Performed

MESSAGES_ALONE = {
    AndTerminationCondition,
    OrTerminationCondition,
    conditions.FunctionCallTermination,
    conditions.HandoffTermination,
    conditions.MaxMessageTermination,
    conditions.SourceMatchTermination,
    conditions.StopMessageTermination,
    conditions.TextMentionTermination,
    conditions.TextMessageTermination,
    conditions.TokenUsageTermination,
}
"""Conditions that follow from the messages: they need no record, and a changed one shows as a drift."""


async def look(
    condition: TerminationCondition,
    place: Place,
    work: Work,
    ask: Callable[[], Awaitable[StopMessage | None]],
) -> StopMessage | None:
    """Ask a condition live. That it stops the run is recorded with the number of the look; a replay stops there.

    A stop that comes while the session is replayed, and that the record doesn't have, comes after the replay.
    """
    recorder = place.session.recorder
    name = work.names.of(condition, place.inside(type(condition).__name__))
    recorder.looks[name] += 1
    look_number = recorder.looks[name]
    position = f"stop/{look_number}"
    if isinstance(condition, TimeoutTermination):
        _count_the_sessions_time(condition, work, recorder.active_now_ms)
    state: dict[str, Any] = getattr(condition, "__dict__", {})
    before = dict(state)
    message = await ask()
    is_recorded = recorder.ahead(f"{name}/{position}") is not None
    is_decided = recorder.is_replaying or recorder.was_asked(name, look_number)
    if not is_recorded and message is not None and is_decided:
        # As if it had not been asked: after its answer it refuses to be asked again.
        state.clear()
        state.update(before)
        return None
    if not is_recorded and message is None:
        return None

    async def stops() -> Performed:
        return Performed(message, Returned(value=written_value(message)))

    answer = await recorder.call(Call(Kind.STOP, name, position, {}), stops)
    if answer.has_value:
        return message
    assert isinstance(answer.content, Returned)
    if message is None and "_terminated" in state:
        # AutoGen's own conditions keep that they have stopped there.
        state["_terminated"] = True
    stop: Any = value_again(answer.content.value)
    return stop if isinstance(stop, StopMessage) else message


def _count_the_sessions_time(condition: TimeoutTermination, work: Work, active_ms: int) -> None:
    """Let a TimeoutTermination count the time that the session was at work.

    By its own clock a replay, which is quick, would not stop where the run was stopped, and a run that was resumed
    would have all of its time again.
    """
    now = time.monotonic()
    started, begun_ms = work.timeouts.get(condition, (None, 0))
    if started != condition._start_time:
        # It was built or reset since the last look.
        begun_ms = active_ms - min(active_ms, round((now - condition._start_time) * 1000))
    condition._start_time = now - (active_ms - begun_ms) / 1000
    work.timeouts[condition] = (condition._start_time, begun_ms)
