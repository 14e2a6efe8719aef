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
        return DurableTimeout(condition, recorder, name)
    if isinstance(condition, ExternalTermination):
        return DurableStop(condition, recorder, name)
    members: Sequence[TerminationCondition] = getattr(condition, "_conditions", ())
    if members:
        twins = [durable_condition(one, recorder, f"{name}.{n}", replace) for n, one in enumerate(members)]
        replace(condition, "_conditions", tuple(twins))
    return condition


class _RecordedEnd:
    """An end that is recorded with the number of the look at which it came: a replay ends at the same one."""

    def __init__(self, recorder: Recorder, name: str) -> None:
        self._recorder = recorder
        self._name = name
        self._looks = 0

    async def is_here(self, is_due: Callable[[], bool]) -> bool:
        """Whether it ends here; in a replay that is what the record says."""
        if in_recorded_call.get():
            return is_due()
        self._looks += 1
        position = f"stop/{self._looks}"
        is_recorded = self._recorder.is_recorded(f"{self._name}/{position}")
        if not is_recorded and not (self._recorder.is_live and is_due()):
            return False
        await self._recorder.event(Kind.STOP, self._name, position, {}, _nothing)
        return True


async def _nothing() -> None:
    """That it is over is all that there is to record."""


class DurableTimeout(TimeoutTermination):
    """A TimeoutTermination that counts the time that the session was at work.

    By its own clock a replay, which is quick, would go on where the run was stopped, and a run that was continued after
    a night would be over at once.
    """

    def __init__(self, inner: TimeoutTermination, recorder: Recorder, name: str) -> None:
        super().__init__(inner._timeout_seconds)
        self._recorder = recorder
        self._end = _RecordedEnd(recorder, name)
        self._begun_ms = recorder.active_now_ms

    async def __call__(self, messages: Messages) -> StopMessage | None:
        is_over = await self._end.is_here(
            lambda: self._recorder.active_now_ms - self._begun_ms >= self._timeout_seconds * 1000
        )
        self._start_time = -math.inf if is_over else math.inf
        return await super().__call__(messages)

    async def reset(self) -> None:
        await super().reset()
        self._begun_ms = self._recorder.active_now_ms


class DurableStop(ExternalTermination):
    """An ExternalTermination; a stop that is given during a replay comes when the replay is over."""

    def __init__(self, inner: ExternalTermination, recorder: Recorder, name: str) -> None:
        super().__init__()
        self._end = _RecordedEnd(recorder, name)
        self._inner = inner

    async def __call__(self, messages: Messages) -> StopMessage | None:
        self._setted = await self._end.is_here(lambda: self._inner._setted)
        return await super().__call__(messages)

    async def reset(self) -> None:
        await super().reset()
        await self._inner.reset()
