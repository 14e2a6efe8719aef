"""Make one durable tool call: key, session file, StartExecution, GetExecution, result.

    from submit_task import submit_tool_call
    text = submit_tool_call("web_search", {"query": "Tokyo"}, session_id="demo1")
    python submit_task.py web_search '{"query": "Tokyo"}' --session-id demo1

Needs a Nexum server (`python -m nexum_engine`) and a worker (`python worker.py`). Another call of the tool with the
same arguments in the same session returns the recorded result, even if any of these processes has crashed meanwhile.
"""

from __future__ import annotations

from support.console import begin_script

begin_script(__name__)  # first, so that Ctrl+C during the slow imports prints no traceback

import argparse
import asyncio
import hashlib
import json
import math
import os
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any, TypeVar
from weakref import WeakValueDictionary, ref

from pydantic import TypeAdapter, ValidationError

from nexum_engine.approvals import how_to_resolve, waiting_for_a_person
from nexum_engine.channel import close_what_is_unused
from nexum_engine.client import NexumClient, Observed, Started
from nexum_engine.errors import (
    ExecutionNotFound,
    FinalError,
    InvalidRequest,
    NexumError,
    ServerNotReady,
    ServerUnavailable,
    WaitTimeout,
)
from nexum_engine.event_loop import LoopThread
from nexum_engine.forks import in_forked_process
from nexum_engine.options import seconds
from nexum_engine.records import Attempt, Execution, ExecutionStatus
from nexum_engine.workflow import Workflow
from support import approvals, notices
from support.approvals import ApprovedCall
from support.console import complain, let_ctrl_c_cancel, run_script, say, say_after_ctrl_c, say_what_is_logged
from support.options import add_nexum_option
from support.session_file import SessionFile
from support.tools import NO_POLICY, TOOLS, Tool, find_tool
from workflow import OFFLINE_TOOL_CALL, TOOL_CALL, ToolCallInput, ToolCallOutput, workflow_of

BRIEFLY = 0.25
"""How many seconds StartExecution waits for the execution to end.

Even on a busy server, a short call should end within this time: otherwise it costs a GetExecution, too. The line
"Submitted" of a longer call appears after this time.
"""
FIRST_NOTICE = 1.0  # seconds after which a waiting call prints its first notice
NOTICE_EVERY = 5.0  # seconds after which a waiting call prints its next notice

T = TypeVar("T")


class Origin(Enum):
    """How a tool call got its result."""

    EXECUTED = "executed"
    """The tool call started the execution."""
    ATTACHED = "attached"
    """The tool call found a RUNNING execution."""
    CACHED = "cached"
    """The tool call found a COMPLETED execution."""


@dataclass(frozen=True)
class ToolResult:
    """A tool's result, with its origin and its execution."""

    text: str
    origin: Origin
    execution_id: str


class ToolCallFailed(NexumError, RuntimeError):
    """The tool call's execution is FAILED or CANCELLED. The error's message has the tool's own reason."""


def call_key(tool_name: str, tool_args: Mapping[str, Any]) -> str:
    """Return the SHA-256, in hex, of the tool's name and its canonical arguments.

    Raises InvalidRequest if the arguments can't be written as JSON.
    """
    try:
        canonical = json.dumps(tool_args, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return hashlib.sha256((tool_name + canonical).encode()).hexdigest()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"the arguments of {tool_name} can't be written as JSON: {error}") from error


class _Deadline:
    """The time at which a caller stops waiting."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.begin_again()

    def begin_again(self) -> None:
        """Restart the timeout. Call this while a person decides, because the time of the decision doesn't count."""
        self._at = time.monotonic() + self.timeout

    @property
    def left(self) -> float:
        return max(0.0, self._at - time.monotonic())


@dataclass(frozen=True)
class _Call:
    """One tool call, and the workflow that executes it."""

    tool_name: str
    tool_args: Mapping[str, Any]
    scope: str
    workflow: Workflow
    tool: Tool | None
    """The tool, if this program declares it. A tool that only the worker declares has no policy here."""
    key: str
    """The call's name within its session, in the session file."""

    @property
    def is_once(self) -> bool:
        return self.tool is not None and self.tool.policy.is_once


class Session:
    """The durable tool calls of one session on one server. Use it as an async context manager, or call `close`.

    `nexum` is the server's address, with the defaults of NexumClient. If `client` is given, the session uses that
    client and never closes it. `tell` is called with each line about progress, from the event loop or from the thread
    that writes the session file.
    """

    def __init__(
        self,
        session_id: str = "default",
        *,
        nexum: str | None = None,
        workflow: Workflow = TOOL_CALL,
        client: NexumClient | None = None,
        tell: Callable[[str], None] = say,
    ) -> None:
        self.session_id = session_id
        self.file = SessionFile(session_id, tell=tell)
        self._tell = tell
        self._client = client or NexumClient(nexum)
        self._owns_client = client is None
        self._named_server = nexum or (os.environ.get("NEXUM_ADDRESS") if client is None else client.servers)
        """The server to name in printed commands. None if it is the server of this folder's database."""
        self._workflow = workflow

    async def __aenter__(self) -> Session:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Finish the session file. Close the connection to the server, unless the session was given a client."""
        await self.file.finish()
        if self._owns_client:
            await self._client.close()

    async def call(
        self, tool_name: str, tool_args: Mapping[str, Any], *, timeout: float = 120, scope: str = ""
    ) -> ToolResult:
        """Run the tool, or find its recorded result. To run the tool again with equal arguments, give another `scope`.

        If the tool's policy requires an approval, first wait until a person has decided, however long that takes.

        Raises a NexumError: ToolCallFailed, ServerUnavailable, NotANexumServer, InvalidRequest, or another refusal or
        fault of the server. Raises WaitTimeout after `timeout` seconds. The time that a person takes to decide doesn't
        count. After WaitTimeout, the execution continues, and the next equal call attaches to the execution. If the
        server doesn't know the execution when the time is up, raises ExecutionNotFound instead.
        """
        if math.isnan(timeout):
            raise InvalidRequest("timeout is not a number: give a number of seconds")
        key = call_key(tool_name, tool_args) + (f":{scope}" if scope else "")
        tool = TOOLS.get(tool_name)
        workflow = self._workflow if tool is None else workflow_of(tool_name, tool.policy, self._workflow)
        call = _Call(tool_name, tool_args, scope, workflow, tool, key)
        deadline = _Deadline(timeout)
        execution_id = await self.file.find(workflow.workflow_id, key)
        while True:
            try:
                if execution_id is not None:
                    recorded = await self._recorded(execution_id, call, deadline)
                    if recorded is not None:
                        return recorded
                started, origin = await self._start(call, deadline)
                execution_id = started.execution_id
                if started.ended is not None:
                    # StartExecution has already reported the execution's end, so don't wait for the session file. Only
                    # this project's server reports the end so early, and this server also finds a call by its key.
                    self.file.record_soon(workflow.workflow_id, key, execution_id)
                    return await self._result_of(execution_id, call, origin, deadline, started.ended)
                writing = asyncio.create_task(self.file.record(workflow.workflow_id, key, execution_id))
                try:
                    return await self._result_of(execution_id, call, origin, deadline)
                finally:
                    await writing
            except ExecutionNotFound as gone:
                # The server or its database was replaced, perhaps while this call waited. Start the call again.
                if not deadline.left:
                    raise
                self._say(f"{gone.execution_id} ({tool_name}) is unknown to this server: looking it up by its key")
                execution_id = None

    async def _ask(self, deadline: _Deadline, ask: Callable[..., Awaitable[T]]) -> T:
        """Return the server's answer to `ask`. If no server answers, print a line, and retry until the deadline."""
        patience = FIRST_NOTICE
        while True:
            try:
                return await ask(patience=min(deadline.left, patience))
            except ServerUnavailable as error:
                if not deadline.left:
                    raise
                is_busy = isinstance(error, ServerNotReady)
                why = str(error) if is_busy else f"no Nexum server answers on {self._client.address}"
            self._say(f"{why}: trying for {deadline.left:.0f} s more")
            patience = NOTICE_EVERY

    async def _recorded(self, execution_id: str, call: _Call, deadline: _Deadline) -> ToolResult | None:
        """Return the result of an execution from the session file. Return None if the call has to be started again.

        The call has to be started again if the execution is FAILED or CANCELLED. But if the tool's effect must happen
        only once, raise ToolCallFailed instead.
        """
        observed = await self._ask(deadline, partial(self._client.get_execution, execution_id))
        status = observed.execution.status
        what = f"{execution_id} ({call.tool_name})"
        if status is ExecutionStatus.COMPLETED:
            self._say(f"{what} already COMPLETED (cached) ✓")
            return ToolResult(_result(call, observed.execution), Origin.CACHED, execution_id)
        if status is ExecutionStatus.RUNNING:
            self._say(f"{what} already RUNNING, attached")
            return await self._result_of(execution_id, call, Origin.ATTACHED, deadline)
        if call.is_once:
            return await self._result_of(execution_id, call, Origin.CACHED, deadline, observed.execution)
        self._say(f"{what} was {status.value}: starting it again")
        return None

    async def _start(self, call: _Call, deadline: _Deadline) -> tuple[Started, Origin]:
        task = ToolCallInput(tool_name=call.tool_name, tool_args=dict(call.tool_args))
        key = f"{self.session_id}:{call.key}"
        if call.tool is not None and call.tool.policy != NO_POLICY:
            if await self._ask(deadline, self._client.server_info) is None:
                raise InvalidRequest(
                    f"{call.tool_name} has a policy ({call.tool.declaration}), and {self._client.address} is a "
                    "published Nexum server, which doesn't keep policies: use this project's own server"
                )
            approved = await self._approved(call, call.tool, key)
            if approved is not None:
                deadline.begin_again()
                task = ToolCallInput(
                    tool_name=call.tool_name, tool_args=approved.arguments, approval=approved.execution_id
                )
                key = approved.key
        start = partial(
            self._client.start_execution,
            call.workflow,
            task,
            idempotency_key=key,
            register=True,
            # Let the server wait briefly for the execution to end: a short call then needs no GetExecution.
            wait=min(deadline.left, BRIEFLY),
        )
        started = await self._ask(deadline, start)
        if not started.existing:
            self._say(f"Submitted {started.execution_id} ({call.tool_name})")
            return started, Origin.EXECUTED
        if started.status.ended:  # COMPLETED; or, for an effect that must happen only once, FAILED or CANCELLED
            return started, Origin.CACHED
        self._say(f"{started.execution_id} ({call.tool_name}) already RUNNING, attached")
        return started, Origin.ATTACHED

    async def _approved(self, call: _Call, tool: Tool, key: str) -> ApprovedCall | None:
        """Ask a person about the call. Return the approved call, or None if the call needs no approval.

        `key` is the idempotency key of the call if it needs no approval.
        """
        try:
            return await approvals.ask(
                self._client,
                tool,
                call.tool_args,
                session_id=self.session_id,
                scope=call.scope,
                workflow=call.workflow.workflow_id,
                unasked_key=key,
                nexum=self._named_server,
                tell=self._say,
            )
        except FinalError as error:
            raise ToolCallFailed(str(error)) from error

    async def _result_of(
        self, execution_id: str, call: _Call, origin: Origin, deadline: _Deadline, ended: Execution | None = None
    ) -> ToolResult:
        """Return the execution's result. Wait until the execution has ended, unless `ended` is given."""
        what = f"{execution_id} ({call.tool_name})"
        notice = FIRST_NOTICE
        while ended is None:
            look = partial(
                self._client.get_execution,
                execution_id,
                wait=min(deadline.left, notice),
                with_attempts=True,  # the notice shows why the latest attempt ended
            )
            try:
                observed = await self._ask(deadline, look)
            except ServerNotReady:
                raise
            except ServerUnavailable as error:
                raise ServerUnavailable(
                    f"{error}. {call.tool_name} was submitted as execution {execution_id}: make the same call again, "
                    "when the server is back, to get its result"
                ) from error
            if (unknown := notices.unknown_attempt(observed.execution)) is not None:
                observed = await self._wait_until_known(execution_id, call, unknown, deadline)
            if observed.execution.status.ended:
                ended = observed.execution
                break
            if not deadline.left:
                # A published Nexum server can lose a task, for instance if a client dies during StartExecution.
                lost = (
                    ". If the worker is idle, the server may have lost the task: then cancel the execution first, with "
                    f"python -m nexum_engine cancel {execution_id}"
                )
                raise WaitTimeout(
                    f"{call.tool_name} has no result after {deadline.timeout:g} s. Execution {execution_id} continues; "
                    f"make the same call again to attach to it{lost if observed.has_poller is None else ''}"
                )
            self._say(f"{what} waiting: {notices.what_for(call.workflow, observed)}")
            notice = NOTICE_EVERY
        if ended.status is ExecutionStatus.COMPLETED:
            done = "already COMPLETED (cached)" if origin is Origin.CACHED else "done"
            self._say(f"{what} {done} ✓")
            return ToolResult(_result(call, ended), origin, execution_id)
        reason = notices.why_it_failed(ended)
        self._say(f"{what} {ended.status.value}: {reason}")
        raise ToolCallFailed(f"{call.tool_name} failed: {reason}")

    async def _wait_until_known(
        self, execution_id: str, call: _Call, attempt: Attempt, deadline: _Deadline
    ) -> Observed:
        """Wait until a person, or a late report, says what happened in an attempt whose effect is unknown."""
        line = (
            f"{execution_id} ({call.tool_name}) is UNKNOWN: attempt {attempt.attempt} by worker "
            f"{attempt.worker_id} may have had its effect ({attempt.error}). "
            f"{how_to_resolve(execution_id, attempt.attempt, self._named_server)}"
        )
        look = partial(self._client.get_execution, execution_id, wait=NOTICE_EVERY, with_attempts=True)
        with waiting_for_a_person(line, self._say):
            deadline.begin_again()
            while notices.unknown_attempt((observed := await self._ask(deadline, look)).execution) is not None:
                deadline.begin_again()
        return observed

    def _say(self, line: str) -> None:
        self._tell(f"[Nexum] {line}")


def _result(call: _Call, execution: Execution) -> str:
    output = execution.outputs().get("tool_call")
    if output is None:
        raise ToolCallFailed(f"{call.tool_name} has no output in execution {execution.execution_id}")
    try:
        return ToolCallOutput.model_validate_json(output).result
    except ValidationError as error:
        if call.tool is not None and call.is_once:
            return call.tool.as_text(json.loads(output))  # a person resolved the call with a text of any form
        raise ToolCallFailed(
            f"the output of {call.tool_name} in execution {execution.execution_id} does not match ToolCallOutput: "
            f"{error.errors()[0]['msg']}"
        ) from error


# ---- For programs ----------------------------------------------------------------------------------------------------

_clients: dict[tuple[asyncio.AbstractEventLoop, str], NexumClient] = {}
# Weak, because a SessionFile is needed only until its calls have ended and are written to disk.
_files: WeakValueDictionary[tuple[str, str], SessionFile] = WeakValueDictionary()


def _client_here() -> NexumClient:
    """Return the running event loop's client, for the server that NEXUM_ADDRESS names or for the default server."""
    closed = [known for known in list(_clients) if known[0].is_closed()]
    loops = [ref(loop) for loop, _ in closed]
    for known in closed:
        _clients.pop(known, None)
    if closed:
        del closed, known
        close_what_is_unused(loops)
    key = (asyncio.get_running_loop(), os.environ.get("NEXUM_ADDRESS", ""))
    if key not in _clients:
        _clients[key] = NexumClient(key[1])
    return _clients[key]


async def submit_tool_call_async(
    tool_name: str, tool_args: Mapping[str, Any], session_id: str = "default", timeout: float = 120, scope: str = ""
) -> str:
    """Make a durable tool call in the session `session_id`. Return the tool's text. Raises what `Session.call` raises.

    All sessions of an event loop share one connection. After the loop is closed, the connection stays open until the
    next call, which comes from another loop.
    """
    async with Session(session_id, client=_client_here()) as session:
        session.file = _files.setdefault((os.getcwd(), session_id), session.file)
        return (await session.call(tool_name, tool_args, timeout=timeout, scope=scope)).text


def submit_tool_call(
    tool_name: str, tool_args: Mapping[str, Any], session_id: str = "default", timeout: float = 120, scope: str = ""
) -> str:
    """Make a durable tool call in the session `session_id`. Return the tool's text. Raises what `Session.call` raises.

    The call blocks. Inside an event loop, await `submit_tool_call_async` instead.
    """
    call = submit_tool_call_async(tool_name, tool_args, session_id, timeout, scope)
    future = asyncio.run_coroutine_threadsafe(call, _background_loop())
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


_background: LoopThread | None = None
_background_lock = threading.Lock()


@in_forked_process
def _forget_background_loop() -> None:
    """Forget the loop, and make a new lock.

    The loop's thread runs only in the parent process. The old lock may have been held by another thread at the fork.
    """
    global _background, _background_lock
    _background, _background_lock = None, threading.Lock()


def _background_loop() -> asyncio.AbstractEventLoop:
    global _background
    with _background_lock:
        if _background is None:
            _background = LoopThread("submit_task")
        return _background.loop


# ---- From the command line -------------------------------------------------------------------------------------------


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("tool", help=f"name of a tool that support/tools declares: {', '.join(sorted(TOOLS))}")
    parser.add_argument("arguments", nargs="?", default="{}", help='a JSON object, such as {"query": "Tokyo"}')
    parser.add_argument(
        "--session-id", metavar="ID", default="default", help="session of the call (default: %(default)s)"
    )
    parser.add_argument("--offline", action="store_true", help="use the offline pages instead of the web")
    parser.add_argument(
        "--timeout",
        type=seconds(),
        metavar="SECONDS",
        default=120.0,
        help="how long to wait for the result (default: %(default)g)",
    )
    add_nexum_option(parser)
    return parser


async def _call_once(args: argparse.Namespace, tool_args: Mapping[str, Any]) -> str:
    let_ctrl_c_cancel()
    workflow = OFFLINE_TOOL_CALL if args.offline else TOOL_CALL
    async with Session(args.session_id, nexum=args.nexum, workflow=workflow) as session:
        return (await session.call(args.tool, tool_args, timeout=args.timeout)).text


def main() -> int:
    """Make one tool call and print its result. Return the exit code: 0 done, 1 failed or timed out.

    Raises another NexumError if the call can't be made. `run_script` then exits with 2.
    """
    parser = _build_parser()
    args = parser.parse_args()
    try:
        tool_args = TypeAdapter(dict[str, Any]).validate_json(args.arguments)
    except ValidationError:
        parser.error(f"the arguments must be a JSON object, not: {args.arguments}")
    find_tool(args.tool).validate(tool_args)
    say_after_ctrl_c("a submitted call continues; run the same command again for its result")
    try:
        say(asyncio.run(_call_once(args, tool_args)))
    except (ToolCallFailed, WaitTimeout) as error:
        complain(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    say_what_is_logged("nexum_engine")
    run_script(main)
