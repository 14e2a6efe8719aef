"""`DurableSession`: a session of an AutoGen program."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cached_property

from durable_autogen.autogen.differences import differences
from durable_autogen.autogen.entry_points import entry_points
from durable_autogen.autogen.session_state import SessionState
from durable_autogen.errors import NotDurable
from durable_autogen.record.place import current
from durable_autogen.record.session import Session


class DurableSession(Session):
    """A session. AutoGen calls inside it are recorded by Nexum. The next run with the same id replays them.

        async with DurableSession("order-4711"):
            result = await team.run(task="...")

    Run agents and teams, call model clients and call tools inside the session. All these calls are recorded, and
    nothing has to be registered. A call is recorded under its agent's name and the number of the agent's reply.

    `sleep` and `wait_for_event` are recorded, too: the process may end while it waits, and the next run continues.

    `on_drift` says what to do if the program differs from the recorded one: "stop" raises an error that says how they
    differ, and "continue" continues live from the first difference. `on_unrecorded` says what to do if the program
    starts a connection or a process outside a recorded call: "tell" reports it, and "stop" ends the run.

    `nexum` is the server's address. It defaults to NEXUM_ADDRESS. If neither is set, the session uses the server of
    this folder's database, or else the server on localhost:50051. If neither server answers, this process opens the
    database itself. `tell` is called with each line about progress. Without `tell`, the logger `durable_autogen` logs
    these lines.

    `budget` limits what the session may spend over all of its runs. At a limit, the session waits for a person, who
    raises the limit or stops the session, with `python -m durable_autogen budget SESSION`. The process may end
    meanwhile.

    `policies` are the policies of tools, by the tool's name. A policy says which calls a person approves, and whether
    the tool's effect must happen only once. It applies to every tool of that name, also to the tools of workbenches and
    MCP servers. The policy "model", or one with a model's name, limits and retries the calls of model clients.

    With `park`, a run ends with Parked instead of waiting for a person. With `approve`, a run that has a
    terminal asks the person at the terminal, and doesn't park.

    Enter a DurableSession only once. Entering it raises SessionBusy, ServerUnavailable, StoreError, and InvalidRequest
    for a wrong argument. Calls inside it, and leaving it, raise DriftError, BudgetExceeded, NotDurable, Parked and the
    server's errors.
    """

    def entry_points(self) -> AbstractContextManager[None]:
        """Record calls of AutoGen's methods for the length of a `with`."""
        return entry_points(self)

    differences = staticmethod(differences)

    @cached_property
    def state(self) -> SessionState:
        """The names of the agents, how many calls each has made, and the ids of messages."""
        return SessionState(self.recorder)


def current_session() -> DurableSession:
    """Return the session inside which the caller runs. For example, a custom agent gets the session of `run_durable`.

    Raises NotDurable outside a session.
    """
    place = current.get()
    if place is None or not isinstance(place.session, DurableSession):
        raise NotDurable("current_session() is called outside a session: call it inside DurableSession or run_durable")
    return place.session
