"""Conditions that end a team's run by something outside: they end a replay where they have ended the run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from autogen_agentchat.base import TerminationCondition
from autogen_agentchat.conditions import ExternalTermination, TimeoutTermination
from autogen_agentchat.messages import BaseAgentEvent, BaseChatMessage, StopMessage

from durable_autogen.events import Kind
from durable_autogen.quiet import in_recorded_call
from durable_autogen.recorder import Recorder

Messages = Sequence[BaseAgentEvent | BaseChatMessage]


def durable_condition(
    condition: TerminationCondition,
    recorder: Recorder,
    name: str,
    replace: Callable[[object, str, object], None],
) -> TerminationCondition:
    """The condition's durable twin, or itself; `replace` puts the twins of an `&` or a `|` in their place."""
    if isinstance(condition, TimeoutTermination):
        return DurableTimeout(condition, recorder)
    if isinstance(condition, ExternalTermination):
        return DurableStop(condition, recorder, name)
    members: Sequence[TerminationCondition] = getattr(condition, "_conditions", ())
    if members:
        twins = [durable_condition(one, recorder, f"{name}.{n}", replace) for n, one in enumerate(members)]
        replace(condition, "_conditions", tuple(twins))
    return condition


class DurableTimeout(TimeoutTermination):
    """A TimeoutTermination whose clock is the record: it counts the time that the session was at work, as recorded.

    By its own clock a replay, which is quick, would go on where the run was stopped, and a run that was continued after
    a night would be over at once.
    """

    def __init__(self, inner: TimeoutTermination, recorder: Recorder) -> None:
        super().__init__(inner._timeout_seconds)
        self._recorder = recorder
        self._begun_ms = recorder.active_ms

    async def __call__(self, messages: Messages) -> StopMessage | None:
        is_over = self._recorder.active_ms - self._begun_ms >= self._timeout_seconds * 1000
        self._start_time = -math.inf if is_over else math.inf
        return await super().__call__(messages)

    async def reset(self) -> None:
        await super().reset()
        self._begun_ms = self._recorder.active_ms


class DurableStop(ExternalTermination):
    """An ExternalTermination whose stop is recorded: a replay stops at the same look at the messages."""

    def __init__(self, inner: ExternalTermination, recorder: Recorder, name: str) -> None:
        super().__init__()
        self._inner = inner
        self._recorder = recorder
        self._name = name
        self._looks = 0

    async def __call__(self, messages: Messages) -> StopMessage | None:
        self._setted = self._inner._setted
        if not in_recorded_call.get():
            self._looks += 1
            position = f"stop/{self._looks}"
            if self._setted or self._recorder.is_recorded(f"{self._name}/{position}"):
                await self._recorder.event(Kind.STOP, self._name, position, {}, self._stop)
                self._setted = True
        return await super().__call__(messages)

    async def _stop(self) -> None:
        """Who stopped it has done so already."""

    async def reset(self) -> None:
        await super().reset()
        await self._inner.reset()
