"""Limits of the rate and the concurrency of this process's calls. The server enforces them.

Before an attempt, a call takes a place: it owns an execution of the workflow `limited-call:NAME`, whose only node has
the limits of the policy. After the attempt, the call completes that execution. So all processes that use the server
share the limits. If a process dies, its places become free when the server notices the death.
"""

from __future__ import annotations

import asyncio
import hashlib

from pydantic import BaseModel, ConfigDict

from durable_autogen.record.events import Call
from durable_autogen.record.journal import Journal
from nexum_engine.policy import Policy
from nexum_engine.records import Task
from nexum_engine.workflow import Workflow, workflow

SAY_AFTER = 1.0  # seconds; if a call waits longer, a log line says so
MAX_SCOPE = 100  # characters; in a key, a longer scope is replaced by its hash


class LimitedCall(BaseModel):
    """The input of the execution that holds a call's place."""

    model_config = ConfigDict(frozen=True)

    session: str
    agent: str
    call: str
    """The part of the call's id that names the call in its session."""


def limited_call(name: str, policy: Policy) -> Workflow:
    """Return the workflow under whose limits the calls of a tool or model are made."""
    return (
        workflow(f"limited-call:{name}", input=LimitedCall)
        .compute("call", rate=policy.rate, concurrency=policy.concurrency)
        .build()
    )


class Turn:
    """The place of one call under the limits of `policy`. `name` is the tool's or model's name.

    If the policy has no limits, the methods do nothing.
    """

    def __init__(self, journal: Journal, call: Call, name: str, policy: Policy) -> None:
        self._journal = journal
        self._call = call
        self._name = name
        self._policy = policy
        self._task: Task | None = None

    async def take(self) -> None:
        """Unless the call has its place already, wait until the limits allow the call, and take the place."""
        if not self._policy.is_limited or self._task is not None:
            return
        journal, scope = self._journal, self._journal.scope_of(self._call.address)
        input = LimitedCall(session=journal.session, agent=self._call.agent, call=scope)
        if len(scope) > MAX_SCOPE:
            scope = hashlib.sha256(scope.encode("utf-8", "surrogatepass")).hexdigest()
        saying = asyncio.get_running_loop().call_later(SAY_AFTER, self._say_waiting)
        try:
            self._task = await journal.take_place(
                limited_call(self._name, self._policy), input, f"{journal.session}:limited/{scope}"
            )
        finally:
            saying.cancel()

    def _say_waiting(self) -> None:
        limits = {"rate": self._policy.rate, "concurrency": self._policy.concurrency}
        told = " and ".join(f"{name} of {limit}" for name, limit in limits.items() if limit is not None)
        self._journal.log.info("%s waits, because of its %s", self._call, told)

    async def free(self) -> None:
        """Free the place for another call."""
        task, self._task = self._task, None
        if task is not None:
            await self._journal.free_place(task)
