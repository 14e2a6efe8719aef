"""The errors of a durable run. All of them are NexumErrors."""

from __future__ import annotations

from nexum_engine.errors import Conflict, InvalidRequest, NexumError


class DriftError(NexumError):
    """The program differs from the one that the session has recorded; the message says how."""


class BudgetExceeded(NexumError):
    """A limit of the session's budget is reached, and a person stopped the session; the message says which and why."""


class SessionBusy(Conflict):
    """Another process is running the session; the message names it."""


class NotDurable(InvalidRequest):
    """A call can't be recorded where it is made; the message says why and what to do."""


class RunCancelled(NexumError):
    """The run was cancelled, by its program or a person. The session's next run resumes from what is recorded."""

    @classmethod
    def of(cls, session: str, how: str = "cancelled") -> RunCancelled:
        """Return the error of a session's run. `how` is "cancelled", or "cancelled by" a name."""
        return cls(f"the run of session {session} was {how}; run it again to resume from what is recorded")


class Parked(NexumError):
    """The run ended, because it waits for a person's decision. The next run of the session continues.

    `waits` says what the run waits for and how to decide.
    """

    def __init__(self, session: str, waits: str) -> None:
        super().__init__(f"session {session} is parked, run it again after the decision: {waits}")
        self.session = session
        self.waits = waits


class CallRejected(NexumError):
    """A person rejected the tool call, or nobody approved it in time; the message has the reason."""


class CallFailed(NexumError):
    """A tool call whose effect is `once` has failed in an earlier attempt, so the call is not made again."""
