"""One session of durable work, for programs that run their agents themselves: `DurableSession`."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager
from types import TracebackType
from typing import Any, TypeVar, get_args

from autogen_agentchat.base import ChatAgent, Team
from autogen_core.models import ChatCompletionClient
from autogen_core.tools import BaseTool, FunctionTool, StaticStreamWorkbench, Workbench

from console import say
from durable_autogen.journal import Journal
from durable_autogen.parts import Parts
from durable_autogen.quiet import watched_threads
from durable_autogen.recorder import OnDrift, Recorder
from nexum_engine.client import DEFAULT_ADDRESS, NexumClient
from nexum_engine.errors import InvalidRequest, ServerUnavailable
from session_file import check_session_id

FIRST_PATIENCE = 2.0  # seconds in which a server has to answer

Runnable = TypeVar("Runnable", bound=ChatAgent | Team)


class DurableSession:
    """What is asked for inside is recorded on a Nexum server; run again, the session replays it and goes on.

        async with DurableSession("order-4711") as session:
            agent = AssistantAgent(
                "clerk",
                session.model_client(client, agent="clerk"),
                workbench=session.workbench([charge, refund], agent="clerk"),
            )
            result = await agent.run(task="...")

    or, for whatever AutoGen builds, `team = session.durable(build_team())`. The model is called in this process, and so
    is a tool that is no `DurableTool`. The place of an event is its agent's name and the number of its reply, so the
    program has to ask in the same order when it is run again; where it asks for something else, that is told.

    Entering it raises SessionBusy, ServerUnavailable and InvalidRequest (the id); asking, and leaving it, DriftError
    and what the server answers. `nexum` defaults to NEXUM_ADDRESS, then localhost:50051. `tell` gets the lines that say
    what is replayed; they go to standard output by default. It can be entered once.
    """

    def __init__(
        self,
        session_id: str,
        *,
        nexum: str | None = None,
        on_drift: OnDrift = "stop",
        tell: Callable[[str], None] = say,
    ) -> None:
        if on_drift not in get_args(OnDrift):
            raise InvalidRequest(f"on_drift is {on_drift!r}: give one of {', '.join(get_args(OnDrift))}")
        self.session_id = check_session_id(session_id)
        self.stop_reason = ""
        """What is recorded as the reason for the run's end."""
        self._address = nexum or os.environ.get("NEXUM_ADDRESS") or DEFAULT_ADDRESS
        self._on_drift = on_drift
        self._tell = tell
        self._stack = AsyncExitStack()
        self._recorder: Recorder | None = None
        self._parts: Parts | None = None

    # ---- What is made durable ----------------------------------------------------------------------------------------

    def model_client(self, client: ChatCompletionClient, *, agent: str) -> ChatCompletionClient:
        """The client with its replies recorded as those of this agent; streams too."""
        return self.parts.model_client(client, agent)

    def workbench(
        self, tools: Workbench | Sequence[BaseTool[Any, Any] | Callable[..., Any]], *, agent: str
    ) -> Workbench:
        """A workbench, or tools and plain functions as one, whose results are recorded with the agent's replies."""
        return self.parts.workbench(tools if isinstance(tools, Workbench) else _bench(tools), agent)

    def durable(self, runnable: Runnable) -> Runnable:
        """The same agent or team, which has never run: what its members call is recorded until the session's end."""
        self.parts.make_durable(runnable, runnable.name if isinstance(runnable, ChatAgent) else "")
        self.parts.settle(runnable)
        return runnable

    # ---- Its run -----------------------------------------------------------------------------------------------------

    @property
    def recorder(self) -> Recorder:
        """The run's events. Raises RuntimeError outside `async with`."""
        if self._recorder is None:
            raise RuntimeError("a DurableSession is used inside `async with`")
        return self._recorder

    @property
    def parts(self) -> Parts:
        """What was made durable. Raises RuntimeError outside `async with`."""
        if self._parts is None:
            raise RuntimeError("a DurableSession is used inside `async with`")
        return self._parts

    async def __aenter__(self) -> DurableSession:
        async with AsyncExitStack() as stack:
            client = await stack.enter_async_context(NexumClient(self._address))
            try:
                await client.ping(patience=FIRST_PATIENCE)
            except ServerUnavailable as error:
                raise ServerUnavailable(f"{error}: start one with python -m nexum_engine") from error
            journal = await stack.enter_async_context(Journal(client, self.session_id, self._tell))
            stack.enter_context(watched_threads())
            self._recorder = Recorder(journal, on_drift=self._on_drift)
            stack.push_async_callback(self._recorder.close)
            stack.enter_context(_no_more_errors_once_stopped(self._recorder))
            self._parts = Parts(self._recorder)
            stack.callback(self._parts.restore)
            stack.callback(self._tell_counts)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        recorder = self.recorder
        failure = recorder.failed.result() if recorder.failed.done() else None
        if error is not None and (failure is None or error is failure or not isinstance(error, Exception)):
            await self._stack.__aexit__(kind, error, traceback)
            return
        async with self._stack:
            if failure is not None:
                raise failure from error  # AutoGen passes on no more than its text
            await recorder.end(self.stop_reason)

    def _tell_counts(self) -> None:
        recorder = self.recorder
        if recorder.live or recorder.replayed:
            self._tell(
                f"[Nexum] session {self.session_id}: {_counts(recorder.live)} live, "
                f"{_counts(recorder.replayed)} replayed from the record"
            )


def _bench(tools: Sequence[BaseTool[Any, Any] | Callable[..., Any]]) -> Workbench:
    return StaticStreamWorkbench(
        [tool if isinstance(tool, BaseTool) else FunctionTool(tool, description=tool.__doc__ or "") for tool in tools]
    )


def _counts(counts: Mapping[str, int]) -> str:
    return (
        f"{counts.get('model calls', 0)} model call(s) ({counts.get('tokens', 0):,} tokens), "
        f"{counts.get('tool calls', 0)} tool call(s)"
        + (f", {counts['inputs']} input(s)" if counts.get("inputs") else "")
    )


@contextmanager
def _no_more_errors_once_stopped(recorder: Recorder) -> Iterator[None]:
    """AutoGen logs a traceback for every agent that ends with the run; the run's own error says it all."""
    log = logging.getLogger("autogen_core")

    def wanted(record: logging.LogRecord) -> bool:
        return not recorder.failed.done()

    log.addFilter(wanted)
    try:
        yield
    finally:
        log.removeFilter(wanted)
