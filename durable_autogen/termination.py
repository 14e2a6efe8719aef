"""A time limit of a team that is the same in a replay as in the run that it replays."""

from __future__ import annotations

import math
from collections.abc import Sequence

from autogen_agentchat.base import TerminationCondition
from autogen_agentchat.conditions import TimeoutTermination
from autogen_agentchat.messages import BaseAgentEvent, BaseChatMessage, StopMessage

from durable_autogen.recorder import Recorder


class DurableTimeout(TimeoutTermination):
    """A TimeoutTermination whose clock is the record: it counts the time that the session was at work, as recorded.

    By its own clock a replay, which is quick, would go on where the run was stopped, and a run that was continued after
    a night would be over at once.
    """

    def __init__(self, inner: TimeoutTermination, recorder: Recorder) -> None:
        super().__init__(inner._timeout_seconds)
        self._recorder = recorder
        self._begun_ms = recorder.active_ms

    async def __call__(self, messages: Sequence[BaseAgentEvent | BaseChatMessage]) -> StopMessage | None:
        is_over = self._recorder.active_ms - self._begun_ms >= self._timeout_seconds * 1000
        self._start_time = -math.inf if is_over else math.inf
        return await super().__call__(messages)

    async def reset(self) -> None:
        await super().reset()
        self._begun_ms = self._recorder.active_ms


def members(condition: TerminationCondition) -> Sequence[TerminationCondition]:
    """What an `&` or a `|` is made of."""
    found: Sequence[TerminationCondition] = getattr(condition, "_conditions", ())
    return found
