"""Recording of termination conditions that depend on more than messages.

A replay stops where the recorded run stopped.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from inspect import ismemberdescriptor
from typing import Any

from autogen_agentchat import conditions
from autogen_agentchat.base import AndTerminationCondition, OrTerminationCondition, TerminationCondition
from autogen_agentchat.conditions import TimeoutTermination
from autogen_agentchat.messages import StopMessage

from durable_autogen.autogen.session_state import SessionState
from durable_autogen.autogen.values import value_again, written_value
from durable_autogen.record.events import Call, Kind, Returned
from durable_autogen.record.pending_call import Performed
from durable_autogen.record.place import Place
from durable_autogen.record.recorder import Recorder

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
"""Conditions that depend only on messages. They need no record: a replay has the same messages."""


async def check(
    condition: TerminationCondition, place: Place, original: Callable[[], Awaitable[StopMessage | None]]
) -> StopMessage | None:
    """Check a condition. If it stops the run, record the stop with the number of the check.

    A replay stops at the recorded check. If the condition would stop a replay at another check, this function returns
    None and restores the condition's state, so that a later check, after the replay, can still stop the run.
    """
    recorder: Recorder = place.session.recorder
    session_state: SessionState = place.session.state
    name = session_state.names.of(condition, place.inside(type(condition).__name__))
    position = recorder.next_position(name, Kind.STOP.value)
    if isinstance(condition, TimeoutTermination):
        _count_the_sessions_time(condition, session_state, recorder.active_now_ms)
    state: dict[str, Any] = getattr(condition, "__dict__", {})
    before, slots_before = dict(state), _slots(condition)
    message = await original()
    is_recorded = f"{name}/{position}" in recorder.replay.ahead
    is_decided = bool(recorder.replay.ahead) or recorder.was_checked(name)
    if not is_recorded and message is not None and is_decided:
        # This run doesn't stop here, so undo the condition's stop. Otherwise, the condition would raise an error at its
        # next check.
        state.clear()
        state.update(before)
        for slot, value in slots_before.items():
            setattr(condition, slot, value)
        return None
    if not is_recorded and message is None:
        return None

    async def stops(_: Call) -> Performed:
        return Performed(message, Returned(value=written_value(message)))

    answer = await recorder.call(Call(Kind.STOP, name, position, {}), stops)
    if not answer.replayed:
        return message
    assert isinstance(answer.content, Returned)
    if message is None:
        session_state.stopped[id(condition)] = condition
        set_terminated(condition, True)
    stop: Any = value_again(answer.content.value)
    return stop if isinstance(stop, StopMessage) else message


def set_terminated(condition: Any, terminated: bool) -> None:
    """Set `terminated` of a custom condition that has a plain attribute for it. A property is wrapped instead."""
    if not isinstance(getattr(type(condition), "terminated", None), property):
        condition.terminated = terminated


def _slots(condition: TerminationCondition) -> dict[str, Any]:
    """Return the attributes that a condition keeps in `__slots__`, and not in its `__dict__`."""
    names = (name for kind in type(condition).__mro__ for name, one in vars(kind).items() if ismemberdescriptor(one))
    return {name: getattr(condition, name) for name in names if hasattr(condition, name)}


def _count_the_sessions_time(condition: TimeoutTermination, session_state: SessionState, active_ms: int) -> None:
    """Make a TimeoutTermination count the session's active time instead of the time on the clock.

    By the clock, a replay takes less time than the run took, so it would not stop where the run stopped. After a crash,
    the next run would get the whole timeout again.
    """
    now = time.monotonic()
    started, begun_ms = session_state.timeouts.get(condition, (None, 0))
    if started != condition._start_time:
        # The start time is new, because the condition was built or reset. Convert the start time to active time.
        begun_ms = active_ms - min(active_ms, round((now - condition._start_time) * 1000))
    condition._start_time = now - (active_ms - begun_ms) / 1000
    session_state.timeouts[condition] = (condition._start_time, begun_ms)
