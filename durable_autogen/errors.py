"""What a durable run raises.

NexumError
|-- DriftError          the program asks for something else than what is recorded
|-- SessionBusy         another process runs the session
|-- NotDurable          a call can't be recorded where it is made
`-- RunCancelled        the run was cancelled; what is recorded stays
"""

from __future__ import annotations

from nexum_engine.errors import Conflict, InvalidRequest, NexumError


class DriftError(NexumError):
    """The program asks for something else than what the session has recorded."""


class SessionBusy(Conflict):
    """Another process runs the session; the message names it."""


class NotDurable(InvalidRequest):
    """A call can't be recorded where it is made; the message says why and what to do."""


class RunCancelled(NexumError):
    """The run was cancelled. The next run with the same session id resumes from what is recorded."""
