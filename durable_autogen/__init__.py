"""Durable AutoGen programs: each model reply, tool result and input is recorded before the program sees it.

After a crash, run the program again: it continues where it stopped. Recorded results are replayed, and nothing that is
recorded is paid for or executed again. No server has to be started:

    from durable_autogen import DurableSession
    async with DurableSession("order-4711"):
        result = await team.run(task="...")      # or any other AutoGen call

In a session, `sleep` and `wait_for_event` wait for hours or days: the process may end meanwhile.

If a person has to approve a tool's calls, or if the tool's effect must happen only once, give the tool a policy
(`durable_tool`, `Policy`).

`run_durable` and `run_durable_stream` run one agent or team in a session. `python -m durable_autogen run SCRIPT` makes
an unchanged script durable. Tools run in the program's process. The loggers `durable_autogen` and `nexum_engine` log
progress and warnings.

The folder `record` records and replays calls, and doesn't import AutoGen: `record/__init__.py` says where a call is
recorded, and where it is compared. The folder `autogen` defines which of AutoGen's methods are recorded, and how.
"""

from __future__ import annotations

import gc
import sys

from nexum_engine.ctrl_c import end_on_ctrl_c

_is_command = sys.argv[:1] == ["-m"] and __name__ in sys.orig_argv  # the process runs `python -m durable_autogen`
if _is_command:
    end_on_ctrl_c()  # first, so that Ctrl+C during the slow imports prints no traceback
    gc.disable()

from durable_autogen.autogen.policies import durable_tool
from durable_autogen.errors import (
    BudgetExceeded,
    CallFailed,
    CallRejected,
    DriftError,
    NotDurable,
    Parked,
    RunCancelled,
    SessionBusy,
)
from durable_autogen.fork import fork_session, fork_source
from durable_autogen.record.budget import Budget
from durable_autogen.record.place import call_id
from durable_autogen.recorded_sessions import SessionInfo, list_sessions, question_of, send_event
from durable_autogen.run import run_durable, run_durable_stream
from durable_autogen.session import DurableSession, current_session
from nexum_engine.deadline import heartbeat
from nexum_engine.policy import NOT_DONE, Policy
from nexum_engine.workflow import RetryPolicy

if _is_command:
    # The imports have made 60,000 objects, and keep them. Without collections of these objects during the imports and
    # at exit, a short command takes a quarter less time.
    gc.freeze()
    gc.enable()

__all__ = [
    "NOT_DONE",
    "Budget",
    "BudgetExceeded",
    "CallFailed",
    "CallRejected",
    "DriftError",
    "DurableSession",
    "NotDurable",
    "Parked",
    "Policy",
    "RetryPolicy",
    "RunCancelled",
    "SessionBusy",
    "SessionInfo",
    "call_id",
    "current_session",
    "durable_tool",
    "fork_session",
    "fork_source",
    "heartbeat",
    "list_sessions",
    "question_of",
    "run_durable",
    "run_durable_stream",
    "send_event",
]
