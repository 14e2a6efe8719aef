"""Ask a person a question that outlives every process. Each question is an execution with one HUMAN_APPROVAL node.

    question = Approval(session="order-4711", agent="clerk", tool="charge", arguments={"cents": 990}, ...)
    decision = await decided(client, approval_workflow(), question, question.key("reply/1/charge"), waiting=...)

A person decides with `nexum approve ID` or `nexum reject ID`, now or while no program runs. The execution's key names
the session, the call and the digest of the tool and its arguments. So a decision counts for that one call only, and not
for another call, other arguments or a fork.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from nexum_engine import jsontext
from nexum_engine.client import NexumClient
from nexum_engine.connection import MAX_SERVER_WAIT, OUTAGE_PATIENCE
from nexum_engine.errors import Conflict, ExecutionNotFound
from nexum_engine.policy import call_digest
from nexum_engine.records import Execution, ExecutionStatus
from nexum_engine.workflow import MAX_ID_LENGTH, Workflow, workflow

NODE = "approval"
"""The name of the HUMAN_APPROVAL node of each question."""


noted_by: ContextVar[Callable[[str], AbstractContextManager[None]] | None] = ContextVar("noted_by", default=None)
"""The function of the surrounding program that announces waits for a person, or None.

`waiting_for_a_person` calls it with a line about the wait. The function returns a context manager, which is open for as
long as the wait takes.
"""


@contextmanager
def waiting_for_a_person(line: str, tell: Callable[[str], object]) -> Iterator[None]:
    """Announce that the body of a `with` waits for a person. `line` says what the person decides, and how.

    In a durable run, the function in `noted_by` gets the line: the run logs it, and may park, which means that the run
    ends and is continued after the decision. Outside of a durable run, `tell` gets the line.
    """
    note = noted_by.get()
    if note is None:
        tell(line)
        yield
    else:
        with note(line):
            yield


class Approval(BaseModel):
    """The question whether a tool may run with these arguments. The person who decides sees these fields."""

    model_config = ConfigDict(frozen=True)

    session: str
    agent: str
    tool: str
    arguments: dict[str, Any]
    """The validated arguments, with the defaults filled in."""
    reason: str = ""
    """Why the model calls the tool, if it said so."""
    digest: str
    """The SHA-256 of the tool and the arguments."""

    @classmethod
    def of(cls, session: str, agent: str, tool: str, arguments: Mapping[str, Any], reason: str = "") -> Approval:
        """Return the question, and compute its digest."""
        digest = call_digest(tool, arguments)
        return cls(session=session, agent=agent, tool=tool, arguments=dict(arguments), reason=reason, digest=digest)

    def key(self, scope: str) -> str:
        """Return the idempotency key of the question. `scope` names the call within its session."""
        return key_of(self.session, "approval", scope, self.digest)


def key_of(session: str, purpose: str, scope: str, digest: str = "") -> str:
    """Return the idempotency key of an execution that belongs to one call of a session.

    `purpose` says what the execution is for, and `scope` names the call (see `key_within`).
    """
    return key_within(f"{session}:{purpose}/", f"{scope}{digest and f'/{digest}'}")


def key_within(prefix: str, name: str, *, room: int = 0) -> str:
    """Return an idempotency key: `prefix` and `name`. The key leaves room for `room` more characters.

    If the name makes the key too long, or has characters that can't be printed, a hash takes the name's place.
    """
    key = f"{prefix}{name}"
    if len(key) <= MAX_ID_LENGTH - room and key.isprintable():
        return key
    return f"{prefix}{hashlib.sha256(key.encode('utf-8', 'surrogatepass')).hexdigest()}"


def approval_workflow(timeout: float | None = None) -> Workflow:
    """Return the workflow of a question about a tool call. After `timeout` seconds, the call counts as rejected."""
    return workflow("tool-approval", input=Approval).human_approval(NODE, timeout_seconds=timeout).build()


@dataclass(frozen=True)
class Decision:
    """The end of a question: a person's decision, or that nobody decided in time."""

    approved: bool
    execution_id: str
    by: str = ""
    """The name of the person who decided. Empty if the person gave no name, or if nobody decided."""
    reason: str = ""
    """The comment of the approval, or why the question was not approved."""
    answer: Any = None
    """The JSON value that came with the approval (for a tool call: the edited arguments), or None."""

    @property
    def refusal(self) -> str:
        """The text that tells the model why the call may not be made."""
        because = f": {self.reason}" if self.reason else ""
        if not self.by:
            return f"this call was not approved{because}"
        return f"{self.by} rejected this call{because}"


async def decided(
    client: NexumClient,
    asked: Workflow,
    question: BaseModel,
    key: str,
    *,
    waiting: Callable[[str], AbstractContextManager[None]],
) -> Decision:
    """Ask the question, unless it was asked before. Wait for the decision, however long it takes, and return it.

    `asked` is the workflow of the question: one HUMAN_APPROVAL node, named `approval`. If nobody has decided yet, the
    wait takes place inside `with waiting(EXECUTION_ID)`, which may raise an error to stop waiting. If a decision was
    made while no program waited for it, it counts, too. Raises Conflict if the key belongs to another question, and the
    server's errors.
    """
    while True:
        execution_id = await ask(client, asked, question, key)
        look = partial(client.get_execution, execution_id, with_attempts=True, patience=OUTAGE_PATIENCE)
        try:
            execution = (await look()).execution
            if not execution.status.ended:
                with waiting(execution_id):
                    while not execution.status.ended:
                        execution = (await look(wait=MAX_SERVER_WAIT)).execution
        except ExecutionNotFound:
            continue  # the server has another database now: ask the question there
        if execution.status is not ExecutionStatus.CANCELLED:  # else the question was withdrawn: ask again
            return decision_of(execution)


async def ask(client: NexumClient, asked: Workflow, question: BaseModel, key: str) -> str:
    """Return the id of the question's execution. Start the execution, unless the question was asked before."""
    # Look for the question first. A rejected question is a FAILED execution, and a start with its key would ask again.
    found = await asked_before(client, asked, key)
    if found is not None:
        if not _is_same(found.input_json, question):
            raise Conflict(f"execution {found.execution_id} asks another question under the key {key!r}")
        return found.execution_id
    started = await client.start_execution(
        asked, question, idempotency_key=key, register=True, patience=OUTAGE_PATIENCE
    )
    return started.execution_id


async def asked_before(client: NexumClient, asked: Workflow, key: str) -> Execution | None:
    """Return the execution of the question that was asked under `key`.

    Return None if no question was asked, or if the newest one was withdrawn (CANCELLED).
    """
    newest = await client.list_executions(
        workflow_id=asked.workflow_id, key_prefix=key, limit=1, with_nodes=True, patience=OUTAGE_PATIENCE
    )
    is_there = newest and newest[0].idempotency_key == key and newest[0].status is not ExecutionStatus.CANCELLED
    return newest[0] if is_there else None


def _is_same(input_json: str, question: BaseModel) -> bool:
    try:
        return type(question).model_validate_json(input_json) == question
    except ValidationError:
        return False


def decision_of(execution: Execution) -> Decision:
    """Return the decision of a question that has ended. Only a COMPLETED execution can be an approval."""
    node = next(one for one in execution.nodes if one.node_id == NODE)
    if execution.status is not ExecutionStatus.COMPLETED:
        # The rejection is recorded as an attempt, which ends together with the execution. If the time ran out, there is
        # no such attempt. Earlier attempts are rejections that a person has undone with a retry.
        last = node.attempts[-1] if node.attempts else None
        if last is None or last.ended_ms != execution.ended_ms:
            return Decision(False, execution.execution_id, reason=node.error or execution.error)
        return Decision(False, execution.execution_id, by=last.worker_id, reason=last.error)
    output = jsontext.parse(node.output_json or "{}", "the decision")
    return Decision(
        bool(output.get("approved")),
        execution.execution_id,
        by=str(output.get("approver", "")),
        reason=str(output.get("comment", "")),
        answer=output.get("answer"),
    )


def how_to_decide(execution_id: str, nexum: str | None) -> str:
    """Return the commands that decide a question, for a line about the wait. `nexum` is the server's address."""
    server = server_option(nexum)
    approve = f"python -m nexum_engine approve {execution_id}{server}"
    return f"{approve}, or: python -m nexum_engine reject {execution_id}{server} --reason TEXT"


def how_to_resolve(execution_id: str, attempt: int, nexum: str | None) -> str:
    """Return what a person does about an attempt with an unknown effect, with the command.

    `nexum` is the server's address.
    """
    command = f"python -m nexum_engine resolve {execution_id}{server_option(nexum)} --attempt {attempt}"
    return f"Find out, then: {command} --result JSON, or --not-done, or --failed REASON"


def server_option(nexum: str | None) -> str:
    """Return the option that names a server in a printed command. `nexum` is the server's address.

    If `nexum` is the path of a database, return "": without the option, the command finds the database in this folder,
    even while no server has it open.
    """
    is_path = nexum is not None and ("/" in nexum or "\\" in nexum)
    return f" --nexum {nexum}" if nexum and not is_path else ""
