"""The attempts at a call under a policy: their retries, their time limits, and the limits that all processes share.

The server enforces `rate` and `concurrency`. Before an attempt, the call takes a slot: it owns an execution of the
workflow `limited-call:NAME`, whose only node has the limits of the policy. After the attempt, the call completes that
execution. So all processes that use the server share the limits. If a process dies, its slots become free when the
server notices the death.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from durable_autogen.record.events import Call, Frozen
from durable_autogen.record.recorder import Recorder
from durable_autogen.record.tasks import cancel_and_wait
from nexum_engine.approvals import key_within
from nexum_engine.deadline import Deadline
from nexum_engine.errors import FinalError, StaleTask, TaskNotFound, UnknownEffect
from nexum_engine.policy import Policy
from nexum_engine.records import Task
from nexum_engine.workflow import workflow

T = TypeVar("T")

SAY_AFTER = 1.0  # seconds; if a call waits longer, a log line says so
ROOM_FOR_NUMBER = 10  # characters that follow the key of a call's slot: a slash and the attempt's number
CANCEL_PATIENCE = 1.0  # seconds that a cancelled attempt has to end


class LimitedCall(Frozen):
    """The input of the execution that counts a call against the limits of its policy."""

    session: str
    agent: str
    call: str
    """The call's scope (see events.py)."""


class ToolError(Exception):
    """An error that a tool returned as its result. `value` is that result, and `__cause__` the exception, if known."""

    def __init__(self, text: str, value: Any) -> None:
        super().__init__(text)
        self.value = value


class TookTooLong(TimeoutError):
    """An attempt exceeded a time limit of its policy: `timeout` or `heartbeat`."""


class Attempts:
    """The attempts at one call of a tool or a model, as `policy` wants them. `name` is the tool's or model's name.

    Without limits in the policy, `take` and `free` do nothing. If a request to the server fails, the run ends.
    """

    def __init__(self, recorder: Recorder, call: Call, name: str, policy: Policy) -> None:
        self._recorder = recorder
        self._journal = recorder.journal
        self._call = call
        self._name = name
        self._policy = policy
        self._task: Task | None = None

    async def make(self, attempt: Callable[[], Awaitable[T]], may_retry: Callable[[], bool] = lambda: True) -> T:
        """Make the call, and retry it as the policy says.

        If an attempt exceeds a time limit of the policy, it fails with TookTooLong. During each attempt, the call holds
        a slot of the policy's rate and concurrency.
        """
        policy, what, number = self._policy, self._call.name, 0
        while True:
            number += 1
            await self._recorder.before_attempt(self._call)
            await self.take()
            try:
                try:
                    return await _in_time(policy, what, attempt)
                finally:
                    await self.free()
            except Exception as error:
                cause = cause_of(error)
                is_final = isinstance(cause, (FinalError, *policy.final)) or (policy.is_once and is_unknown(cause))
                delay_ms = None
                if policy.retry is not None and not is_final and may_retry():
                    delay_ms = policy.retry.delay_ms(number)
                if delay_ms is None:
                    raise
                delay = max(delay_ms / 1000, retry_after(cause))
                self._journal.log.warning("%s failed (attempt %d), retrying in %.3g s: %s", what, number, delay, cause)
                await asyncio.sleep(delay)

    async def take(self) -> None:
        """Wait until the limits allow the call, and take a slot. Do nothing if the call has a slot already."""
        if not self._policy.is_limited or self._task is not None:
            return
        journal, scope = self._journal, self._journal.recorded.scope_of(self._call.address)
        input = LimitedCall(session=journal.session, agent=self._call.agent, call=scope)
        key = key_within(f"{journal.session}:limited/", scope, room=ROOM_FOR_NUMBER)
        saying = asyncio.get_running_loop().call_later(SAY_AFTER, self._say_waiting)
        try:
            with self._recorder.servers_errors():
                limits = workflow(f"limited-call:{self._name}", input=LimitedCall).compute(
                    "call", rate=self._policy.rate, concurrency=self._policy.concurrency
                )
                self._task = await journal.under_this_run(journal.owner.take_slot, limits.build(), input, key=key)
        finally:
            saying.cancel()

    def _say_waiting(self) -> None:
        limits = {"rate": self._policy.rate, "concurrency": self._policy.concurrency}
        told = " and ".join(f"{name} of {limit}" for name, limit in limits.items() if limit is not None)
        self._journal.log.info("%s waits, because of its %s", self._call, told)

    async def free(self) -> None:
        """Free the slot for another call."""
        task, self._task = self._task, None
        if task is not None:
            # Do nothing if the server freed the slot already, or if its database was replaced.
            with self._recorder.servers_errors(), contextlib.suppress(StaleTask, TaskNotFound):
                await self._journal.owner.complete(task, {})


def cause_of(error: BaseException) -> BaseException:
    """Return the exception that caused a ToolError, if known. Return any other error itself."""
    return error.__cause__ if isinstance(error, ToolError) and error.__cause__ is not None else error


def is_unknown(cause: BaseException) -> bool:
    """Return whether the effect may have happened although the attempt raised this error."""
    return isinstance(cause, (UnknownEffect, TookTooLong))


async def _in_time(policy: Policy, name: str, attempt: Callable[[], Awaitable[T]]) -> T:
    """Make an attempt. Raises TookTooLong if it exceeds the policy's `timeout` or `heartbeat`."""
    deadline = Deadline(policy.timeout, policy.heartbeat)
    if not deadline.is_limited:
        return await attempt()
    running = deadline.start(attempt)
    try:
        if await deadline.in_time(running):
            return await running
        raise TookTooLong(f"{name} {deadline.exceeded()}")
    finally:
        await cancel_and_wait(running, CANCEL_PATIENCE)


def retry_after(error: BaseException) -> float:
    """Return how many seconds a service asks to wait before a retry: an attribute `retry_after`, or a header."""
    asked = getattr(error, "retry_after", None)
    if isinstance(asked, (int, float)):
        return max(0.0, float(asked))
    headers: Any = getattr(getattr(error, "response", None), "headers", None) or {}
    ways: tuple[Callable[[], float], ...] = (
        lambda: float(headers.get("retry-after-ms")) / 1000,
        lambda: float(headers.get("retry-after")),
        lambda: parsedate_to_datetime(headers.get("retry-after")).timestamp() - time.time(),
    )
    for seconds in ways:
        with contextlib.suppress(TypeError, ValueError):
            return max(0.0, seconds())
    return 0.0
