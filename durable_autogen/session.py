"""One session of an AutoGen program: `DurableSession`."""

from __future__ import annotations

from contextlib import AbstractContextManager

from durable_autogen.autogen.entry_points import entry_points
from durable_autogen.autogen.fingerprints import differences
from durable_autogen.record.recorder import OnDrift
from durable_autogen.record.session import OnUnrecorded, Session


class DurableSession(Session):
    """What AutoGen is asked for inside is recorded on a Nexum server; the next run with the same id replays it.

        async with DurableSession("order-4711"):
            result = await team.run(task="...")

    Whatever the program does with AutoGen inside belongs to the session: it runs agents and teams, asks model clients,
    calls tools. Nothing of it has to be told to the session. The place of an event in the record is its agent's name
    and the number of its reply; if the program asks for something else than what is recorded there, that is an error
    which says what differs (`on_drift="stop"`), or the session continues live from there (`on_drift="continue"`).

    A connection or a process that the program starts outside a recorded call is told (`on_unrecorded="tell"`), or ends
    the run (`on_unrecorded="stop"`). `nexum` is the server's address; it defaults to NEXUM_ADDRESS, then to the server
    of this folder's database, then to localhost:50051. What a person should read is logged by the logger
    `durable_autogen`.

    Entering raises SessionBusy, ServerUnavailable, and InvalidRequest for a wrong argument. Calls inside, and leaving,
    raise DriftError, NotDurable, and what the server answers. A session can be entered once.
    """

    def __init__(
        self,
        session_id: str,
        *,
        nexum: str | None = None,
        on_drift: OnDrift = "stop",
        on_unrecorded: OnUnrecorded = "tell",
    ) -> None:
        super().__init__(
            session_id,
            nexum=nexum,
            on_drift=on_drift,
            on_unrecorded=on_unrecorded,
            compare=differences,
        )

    def entry_points(self) -> AbstractContextManager[None]:
        """Let AutoGen's methods record for the length of a `with`."""
        return entry_points(self)

    async def __aenter__(self) -> DurableSession:
        await super().__aenter__()
        return self
