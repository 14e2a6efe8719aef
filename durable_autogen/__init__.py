"""AutoGen on durable execution: what a program asks AutoGen for is recorded before the program sees the answer.

A program that was killed and is started again continues as the same run: recorded replies, tool results and inputs are
replayed; nothing that is recorded is paid for or executed again. A Nexum server has to be running
(`python -m nexum_engine`):

    from durable_autogen import DurableSession
    async with DurableSession("order-4711"):
        result = await team.run(task="...")      # or whatever else the program does with AutoGen

`run_durable` and `run_durable_stream` are the same with a task and a result, and
`python -m durable_autogen run their_script.py` makes a script durable that knows nothing of this package. Tools run in
the program's process. The loggers `durable_autogen` and `nexum_engine` say what a person should read.

The folder `record` records and replays, and imports nothing of AutoGen; the folder `autogen` says which of AutoGen's
methods record, and how.
"""

from __future__ import annotations

from durable_autogen.errors import DriftError, NotDurable, RunCancelled, SessionBusy
from durable_autogen.record.place import call_id
from durable_autogen.run import run_durable, run_durable_stream
from durable_autogen.session import DurableSession
from durable_autogen.sessions import SessionInfo, fork_session, fork_source, list_sessions, question_of

__all__ = [
    "DriftError",
    "DurableSession",
    "NotDurable",
    "RunCancelled",
    "SessionBusy",
    "SessionInfo",
    "call_id",
    "fork_session",
    "fork_source",
    "list_sessions",
    "question_of",
    "run_durable",
    "run_durable_stream",
]
