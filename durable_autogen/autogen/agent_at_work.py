"""Tracking of the agent or team at work, so that its calls are recorded under its name.

The place of the agent is set only while a step of the agent's stream runs. The stream's consumer keeps its own place.
"""

from __future__ import annotations

import asyncio
import dataclasses
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn

from autogen_agentchat.base import Response, TaskResult
from autogen_agentchat.teams import GraphFlow
from autogen_core import CancellationToken

from durable_autogen.autogen.fingerprints import turn_fingerprint
from durable_autogen.autogen.session_state import SessionState
from durable_autogen.autogen.transcript import messages_of
from durable_autogen.record.place import Place, at, steps_at
from durable_autogen.record.recorder import Recorder
from durable_autogen.record.tasks import closing, made_ordinary, times_cancelled


class AtWork:
    """An agent or a team at work, with the `Place` of its calls.

    Its methods pass on a turn or a run. `original` is AutoGen's own method, bound to the caller's arguments.
    """

    def __init__(self, outer: Place, runnable: Any, *, is_team: bool) -> None:
        self._outer = outer
        self._session_state: SessionState = outer.session.state
        self._recorder: Recorder = outer.session.recorder
        names, path = self._session_state.names, outer.path
        # If the program itself runs a team, the names of the team's members get no prefix.
        if outer.is_inside or not is_team:
            path = names.of(runnable, outer.inside(runnable.name))
        agent = path
        if is_team:
            # Name the team's own calls, such as the call that selects the next speaker.
            agent = names.of(runnable, f"{path or type(runnable).__name__} (team)")
        else:
            self._session_state.speaks_as(agent, runnable.name)
        self.place = dataclasses.replace(
            outer,
            agent=agent,
            path=path,
            is_beside_others=outer.is_beside_others or isinstance(runnable, GraphFlow),
            at_work=runnable,
        )

    async def turn(
        self, original: Callable[[], AsyncIterator[Any]], token: CancellationToken | None
    ) -> AsyncGenerator[Any, None]:
        """Yield the items of an agent's streamed turn."""
        async with closing(steps_at(self.place, original())) as steps:
            try:
                async for item in steps:
                    yield await self._settled(item)
            except GeneratorExit:
                raise
            except BaseException as error:  # noqa: BLE001 - `_raise` raises it
                self._raise(error, token)

    async def whole_turn(self, original: Callable[[], Awaitable[Any]], token: CancellationToken | None) -> Any:
        """Return the response of an agent's turn that isn't streamed."""
        try:
            with at(self.place):
                item = await original()
        except BaseException as error:  # noqa: BLE001 - `_raise` raises it
            self._raise(error, token)
        return await self._settled(item)

    def team_run(self, original: Callable[[], AsyncIterator[Any]], task: Any) -> AsyncGenerator[Any, None]:
        """Return the items of a team's run. The team's own code runs at the team's place."""
        return self.run(lambda: steps_at(self.place, original()), task)

    async def run(self, original: Callable[[], AsyncIterator[Any]], task: Any) -> AsyncGenerator[Any, None]:
        """Yield the items of an agent's or a team's run."""
        await self._begin()
        async with closing(original()) as items:
            async for item in items:
                yield await self._settled(item, task)

    async def whole_run(self, original: Callable[[], Awaitable[TaskResult]], task: Any) -> TaskResult:
        """Return the result of an agent's run that isn't streamed."""
        await self._begin()
        result: TaskResult = await self._settled(await original(), task)
        return result

    async def _begin(self) -> None:
        self._recorder.starts_an_agent()
        if not self._outer.is_inside:
            await self._recorder.begin_session()

    async def _settled(self, item: Any, task: Any = None) -> Any:
        """Return an item of a turn or a run, ready for the consumer."""
        place = self.place
        self._session_state.transcript.settle(place.agent, item, messages_of(task))
        if isinstance(item, (Response, TaskResult)):
            # A team that the program runs itself has the path of the program, whose other agents it doesn't contain.
            is_own_path = place.path != self._outer.path
            self._recorder.setbacks.turn_is_over(place.path if is_own_path else place.agent)
            if isinstance(self._outer.at_work, GraphFlow):
                # Record the end of the turn: in a replay, parallel members end their turns in the recorded order.
                with at(place):
                    position = self._recorder.next_position(place.agent, "turn")
                    await self._recorder.mark(place.agent, position, turn_fingerprint(_words(item)))
        if isinstance(item, TaskResult) and not self._outer.is_inside:
            return self._session_state.transcript.result(item)
        return item

    def _raise(self, error: BaseException, token: CancellationToken | None) -> NoReturn:
        """Raise `error`. Turn it into an ordinary exception if AutoGen would otherwise wait for the agent for ever."""
        if isinstance(error, (Exception, KeyboardInterrupt, SystemExit)):
            raise error
        is_by_token = token is not None and token.is_cancelled()
        is_meant = self._recorder.failed.done() or is_by_token or times_cancelled(asyncio.current_task()) > 0
        if isinstance(error, asyncio.CancelledError) and (is_meant or sys.version_info < (3, 11)):
            raise error  # Python 3.10 can't tell whether the caller cancelled the agent
        raise made_ordinary(error, self.place.agent) from error


def _words(item: Response | TaskResult) -> str:
    messages = item.messages if isinstance(item, TaskResult) else [item.chat_message]
    return "\n".join(message.to_text() for message in messages)
