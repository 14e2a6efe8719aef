"""`DurableSession`: a session of an AutoGen program."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from durable_autogen.autogen.entry_points import entry_points
from durable_autogen.autogen.fingerprints import differences
from durable_autogen.record.recorder import OnDrift
from durable_autogen.record.session import OnUnrecorded, Session


class DurableSession(Session):
    """A session: AutoGen calls inside are recorded on a Nexum server, and the next run with the same id replays them.

        async with DurableSession("order-4711"):
            result = await team.run(task="...")

    Run agents and teams, ask model clients and call tools inside: all of it is recorded, and nothing has to be
    registered. A call is recorded under its agent's name and the number of that agent's reply. If the program differs
    from the recorded one, it gets an error that says how (`on_drift="stop"`), or the session continues live from there
    (`on_drift="continue"`).

    A connection or a process that the program starts outside a recorded call is reported (`on_unrecorded="tell"`), or
    ends the run (`on_unrecorded="stop"`). `nexum` is the server's address; it defaults to NEXUM_ADDRESS, then to the
    server of this folder's database, then to localhost:50051. Messages for a person go to `tell`, or are
    logged by the logger `durable_autogen`.

    Entering raises SessionBusy, ServerUnavailable, and InvalidRequest for a wrong argument. Calls inside and leaving
    raise DriftError, NotDurable and the server's errors. A session can be entered once.
    """

    def __init__(
        self,
        session_id: str,
        *,
        nexum: str | None = None,
        on_drift: OnDrift = "stop",
        on_unrecorded: OnUnrecorded = "tell",
        tell: Callable[[str], None] | None = None,
    ) -> None:
        super().__init__(
            session_id,
            nexum=nexum,
            on_drift=on_drift,
            on_unrecorded=on_unrecorded,
            tell=tell,
            compare=differences,
        )

    def entry_points(self) -> AbstractContextManager[None]:
        """Record AutoGen's methods for the length of a `with`."""
        return entry_points(self)

    async def __aenter__(self) -> DurableSession:
        await super().__aenter__()
        return self
