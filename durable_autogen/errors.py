"""What a durable run raises.

NexumError
|-- DriftError          the program asks for something else than what is recorded
|-- SessionBusy         another process runs the session
|-- NotDurable          a part of the team does what can't be recorded
`-- RunCancelled        the run was cancelled; what is recorded stays
"""

from __future__ import annotations

from nexum_engine.errors import Conflict, InvalidRequest, NexumError


class DriftError(NexumError):
    """The program asks for something else than what the session has recorded."""


class SessionBusy(Conflict):
    """Another process runs the session; the message names it."""


class NotDurable(InvalidRequest):
    """A part of the team acts on the world in a way that can't be recorded; the message says which and why."""


class RunCancelled(NexumError):
    """The run was cancelled. The same run goes on from what is recorded."""
