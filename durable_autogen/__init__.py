"""AutoGen on durable execution: what an agent or a team asks for is recorded before it sees the answer.

A program that was killed goes on as the same run: recorded replies, tool results and inputs are replayed, nothing that
is recorded is paid for or executed again. Of an AutoGen program two lines change; a Nexum server has to be running
(`python -m nexum_engine`):

    from durable_autogen import run_durable
    result = await run_durable(build_team, task="...", session_id="s1")      # instead of build_team().run(task="...")

`run_durable_stream` is `run_stream` in the same way. A tool that should run in a worker, and outlive this
process there, is one line: `tools=[DurableTool(tool, session)]`; every other tool runs in this process, and
its result is recorded.

A program that runs its agents itself opens a `DurableSession`, and takes model clients and workbenches from it.

This package knows AutoGen and `submit_task`; the engine knows neither.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from durable_autogen.errors import DriftError, NotDurable, RunCancelled, SessionBusy
from durable_autogen.history import SessionInfo, fork_session, list_sessions, question_of
from durable_autogen.session import DurableSession
from durable_autogen.team import run_durable, run_durable_stream

if TYPE_CHECKING:
    from durable_autogen.tools import DurableTool

__all__ = [
    "DriftError",
    "DurableSession",
    "DurableTool",
    "NotDurable",
    "RunCancelled",
    "SessionBusy",
    "SessionInfo",
    "fork_session",
    "list_sessions",
    "question_of",
    "run_durable",
    "run_durable_stream",
]


def __getattr__(name: str) -> Any:
    # Only who runs tools in a worker needs the modules of theirs, whose names a program may have taken for its own.
    if name == "DurableTool":
        from durable_autogen.tools import DurableTool

        return DurableTool
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
