"""Calls under a policy: approvals, and effects that must happen only once. Retries and limits are in attempts.py.

A call without a policy makes no request to the server about approvals, effects or limits.
"""

from __future__ import annotations

import asyncio
import difflib
import json
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from durable_autogen.errors import CallFailed, CallRejected
from durable_autogen.record.attempts import Attempts, cause_of, is_unknown
from durable_autogen.record.effects import (
    EFFECT,
    TOOL_EFFECT,
    TOOL_EFFECT_RECONCILED,
    Effect,
    EffectInput,
    Effects,
    effects_prefix,
    read_effects,
    reuse_prefix,
)
from durable_autogen.record.events import Call
from durable_autogen.record.place import call_id
from durable_autogen.record.recorder import Recorder
from nexum_engine import jsontext
from nexum_engine.approvals import (
    NODE,
    Approval,
    approval_workflow,
    asked_before,
    decided,
    how_to_decide,
    how_to_resolve,
    key_of,
)
from nexum_engine.client import Started
from nexum_engine.connection import OUTAGE_PATIENCE
from nexum_engine.errors import Conflict, InvalidRequest, NexumError, RoleRefused, UnknownEffect
from nexum_engine.options import user_name
from nexum_engine.policy import NOT_DONE, Policy
from nexum_engine.records import DeclaredTool, Execution, ExecutionStatus, NodeStatus, Task

MODEL = "model"
"""The name of the policy of all model clients that have no policy under their model's name."""
SIMILAR = 0.8
"""From this similarity on, the name of a policy may be a mistyped name of a tool (difflib's ratio)."""
MAX_SHOWN = 300  # characters; a log line cuts off the rest of a call
RESOLVE_INTERVAL = 1.0  # seconds between looks: `resolve --not-done` doesn't end the execution, so it ends no wait

RECORDED_RESULT = "recorded_result"
"""The only name in the output of an effect whose tool returned. A person's result has another form."""

_UNKNOWN: Any = object()

Ask = Callable[[str], Awaitable[tuple[bool, str] | None]]
"""A function that asks the person at the terminal about a call. Its parameter is a text about the call. It returns
whether the person approves the call, and a comment or reason. If the person doesn't decide, it returns None."""


Attempt = Callable[[Mapping[str, Any]], Awaitable[Any]]
"""A function that makes one attempt at a call. Its parameter is the arguments."""


class CalledTool(Protocol):
    """A call of a tool, as far as a guard has to know the tool's arguments and results."""

    def fits(self, complete: Mapping[str, Any]) -> bool:
        """Return whether `complete` are the call's arguments with defaults. The defaults may be others than now."""

    def read(self, written: Any) -> Any:
        """Return the result from the JSON in which it is recorded."""

    def of_answer(self, answer: Any) -> Any:
        """Turn an answer of `reconcile` or of a person into a tool result."""


@dataclass(frozen=True)
class GuardedCall:
    """A call of a tool under a policy."""

    call: Call
    policy: Policy
    arguments: Mapping[str, Any]
    """The validated arguments, as JSON, with the defaults filled in."""
    tool: CalledTool
    write: Callable[[Any], Any]
    """A function that returns a result as JSON. It raises ValueError if the result can't be recorded."""
    reason: str = ""
    """Why the model calls the tool, if it said so."""

    def __str__(self) -> str:
        whole = self.whole()
        return (
            whole if len(whole) <= MAX_SHOWN else f"{whole[:MAX_SHOWN]}... (cut) of {self.call.agent or 'the program'}"
        )

    def whole(self) -> str:
        """Return the call with all of its arguments. Characters that could deceive the reader are escaped."""
        arguments = json.dumps(dict(self.arguments), ensure_ascii=False, default=str)
        return jsontext.escaped(f"{self.call.tool}({arguments}) of {self.call.agent or 'the program'}")


class Guard:
    """The policies of one run, and the calls under them."""

    def __init__(self, recorder: Recorder, policies: Mapping[str, Policy], *, ask: Ask | None) -> None:
        self._recorder = recorder
        self._journal = recorder.journal
        self._effects = Effects(recorder.journal)
        self._client = recorder.journal.client
        self._log = recorder.journal.log
        self._of_models = policies.get(MODEL, Policy())
        if self._of_models.approval is not None or self._of_models.is_once:
            raise InvalidRequest(
                "a model's policy has only retry, final, timeout, heartbeat, rate and concurrency: approval and effect "
                "are for tools"
            )
        self._policies = policies
        self._ask = ask
        self._known: set[str] = set()
        """The names of the tools and models that the run has seen."""
        self._attempted_effects: set[str] = set()
        """The ids of the effects that this run has attempted, or has asked `reconcile` about.

        If such an effect is unknown, a person has to resolve it: the run's own attempt may still be at work.
        """
        self._reusable: list[Effect] | None = None
        """The results that the session may reuse, if it is a fork. None until the first call asks for them."""
        self._taking = asyncio.Lock()
        self._declared: set[str] = set()
        """The names of the tools with policies that the server knows of."""
        for name, policy in policies.items():
            self._declare(name, policy)

    # ---- Policies ----------------------------------------------------------------------------------------------------

    def of_tool(self, *names: str, own: Policy | None = None) -> Policy | None:
        """Return the session's policy for one of a tool's names; if there is none, the tool's `own` policy."""
        self._known.update(names)
        found = next((self._policies[name] for name in names if name in self._policies), own)
        if found is None:
            self._check_name(names[0])
        else:
            self._declare(names[0], found)
        return found

    def _declare(self, name: str, policy: Policy) -> None:
        """Let `nexum tools` list the tool, or the model clients, while the run is connected."""
        if name not in self._declared:
            self._declared.add(name)
            declared = jsontext.dump(policy.described(), "the policy")
            self._journal.owner.declare([DeclaredTool(name, "", declared, self._journal.session)])

    def _check_name(self, tool: str) -> None:
        """Raise InvalidRequest if a tool without a policy has a name similar to that of a policy without a tool.

        The policy's name may be mistyped. Without this check, the tool would then run unguarded.
        """
        unknown = self._unknown_names()
        similar = difflib.get_close_matches(tool, unknown, n=1, cutoff=SIMILAR) if unknown else []
        if similar:
            error = InvalidRequest(
                f"{tool} has no policy, and no tool is known yet for the policy of {similar[0]}. If that name is "
                f"mistyped, correct it. If {tool} needs no policy, give it an empty one"
            )
            self._recorder.stop(error)
            raise error

    def _unknown_names(self) -> list[str]:
        """Return the names of the policies that belong to no tool or model that the run has seen."""
        return sorted(self._policies.keys() - self._known - {MODEL})

    def of_model(self, name: str) -> Policy:
        """Return the policy for a model of this name: an empty one if the session has none."""
        self._known.add(name)
        return self._policies.get(name, self._of_models)

    def offers(self, tools: Iterable[str]) -> None:
        """Note the names of the tools that an agent offers to its model."""
        self._known.update(tools)

    def warn_of_unknown_names(self) -> None:
        """Log a warning about each policy whose name no tool or model of the run has."""
        if unknown := self._unknown_names():
            self._log.warning(
                "policies for unknown tools: %s. Check the names. Known: %s",
                *(", ".join(unknown), ", ".join(sorted(self._known)) or "no tool"),
            )

    # ---- Approvals ---------------------------------------------------------------------------------------------------

    async def approved(self, guarded: GuardedCall) -> tuple[GuardedCall, Any, str]:
        """Wait until a person has approved a call; return the call that was shown, the edited arguments, and the name.

        The edited arguments are None if the person has not edited them. The name is the person's. Raises CallRejected
        if a person rejects the call, or if nobody approves it in time.
        """
        call = guarded.call
        asked = approval_workflow(guarded.policy.approval_timeout)
        key = key_of(self._journal.session, NODE, self._journal.recorded.scope_of(call.address), call.digest)

        @contextmanager
        def waiting(execution_id: str) -> Iterator[None]:
            line = f"waiting for a decision on {guarded}: {how_to_decide(execution_id, self._client.servers)}"
            with self._recorder.questions.waiting(call.address, line), ExitStack() as stack:
                if self._ask is not None:
                    asking = asyncio.ensure_future(self._ask_at_once(self._ask, execution_id, guarded))
                    stack.callback(asking.cancel)
                yield

        self._journal.may_leave_open = True
        with self._recorder.servers_errors():
            earlier = await asked_before(self._client, asked, key)
        if earlier is not None:
            # An earlier run may have asked with other defaults, such as another new id. Then make the call with the
            # arguments that the earlier run has shown to the person.
            arguments = dict(jsontext.parse(earlier.input_json, "the question").get("arguments") or {})
            if guarded.tool.fits(arguments):
                guarded = replace(guarded, arguments=arguments)
        question = Approval.of(self._journal.session, call.agent, call.tool, guarded.arguments, guarded.reason)
        with self._recorder.servers_errors():
            decision = await decided(self._client, asked, question, key, waiting=waiting)
        if not decision.approved:
            self._log.warning("%s: %s", guarded, jsontext.escaped(decision.refusal))
            raise CallRejected(decision.refusal)
        self._log.info("%s: approved%s", guarded, f" by {jsontext.escaped(decision.by)}" if decision.by else "")
        return guarded, decision.answer, decision.by

    async def _ask_at_once(self, ask: Ask, execution_id: str, guarded: GuardedCall) -> None:
        """Ask the person at the terminal. Another person may decide first."""
        reason = f"\n    reason: {jsontext.escaped(guarded.reason)}" if guarded.reason else ""
        answer = await ask(f"{guarded.whole()}{reason}")
        if answer is None:
            return
        approves, comment = answer
        decide = (
            partial(self._client.approve, comment=comment) if approves else partial(self._client.reject, reason=comment)
        )
        try:
            await decide(execution_id, NODE, approver=user_name(), patience=OUTAGE_PATIENCE)
        except Conflict:
            # Somebody else was faster, or this decision is recorded and the server's answer was lost. In both cases,
            # the wait gets the decision, and says whose it is.
            self._log.warning("%s is decided already", guarded)
        except NexumError as error:  # for instance, the server's token doesn't allow it
            self._log.warning("your decision on %s was not recorded: %s", guarded, error)

    # ---- Effects -----------------------------------------------------------------------------------------------------

    async def once(self, guarded: GuardedCall, attempt: Attempt) -> Any:
        """Return the result of a call whose effect must happen only once. Make the call if it has no recorded result.

        If an earlier attempt may have had its effect, the policy's `reconcile` decides whether the call is made. If
        there is no `reconcile`, or if it can't tell, a person decides. Raises CallFailed if an earlier attempt has
        failed, and DriftError if an earlier run has begun another call in its place.
        """
        attempts = Attempts(self._recorder, guarded.call, guarded.call.tool, guarded.policy)
        try:
            while True:
                # Wait for the limits before the effect begins: if the run dies in this wait, nothing has happened.
                await attempts.take()
                with self._recorder.servers_errors():
                    guarded, started = await self._started(guarded)
                if started.task is None:
                    await attempts.free()
                    ended = started.ended or await self._resolved(guarded, started.execution_id)
                    if ended is not None:
                        return _result(ended, guarded)
                    continue
                if (value := await self._attempted(guarded, started.task, attempt, attempts)) is not _UNKNOWN:
                    return value
        finally:
            await attempts.free()

    async def _started(self, guarded: GuardedCall) -> tuple[GuardedCall, Started]:
        """Begin an effect, take it over, or find its result. Return the call with the arguments that belong to it."""
        kind = TOOL_EFFECT if guarded.policy.reconcile is None else TOOL_EFFECT_RECONCILED
        input = self._input(guarded)
        key = input.key
        while True:
            started = await self._effects.start(kind, input, key)
            if started is not None:
                return guarded, started
            begun = await read_effects(self._client, key)
            earlier = next(one for one, execution in begun if execution.idempotency_key == key)
            if earlier.digest == input.digest or (earlier.tool, earlier.arguments) == (input.tool, input.arguments):
                # The earlier run began the same call. If its arguments differ, a default has another value now, such as
                # an id that is new for each call: use the arguments of the earlier run. If the hashes differ, another
                # version of this library began the call, or a person edited its arguments.
                input, guarded = earlier, replace(guarded, arguments=earlier.arguments)
            else:
                self._recorder.differs(
                    f"an earlier run has begun {earlier}, whose effect must happen only once, and now the program asks "
                    f"for {guarded} in its place"
                )
                key = key_of(input.session, EFFECT, input.call, input.digest)

    def _input(self, guarded: GuardedCall) -> EffectInput:
        call = guarded.call
        return EffectInput(
            session=self._journal.session,
            agent=call.agent,
            tool=call.tool,
            arguments=dict(guarded.arguments),
            call=self._journal.recorded.scope_of(call.address),
            digest=call.digest,
        )

    async def _attempted(self, guarded: GuardedCall, task: Task, attempt: Attempt, attempts: Attempts) -> Any:
        """Make one attempt at an effect; return its result, or _UNKNOWN if the effect may or may not have happened."""
        self._attempted_effects.add(task.execution_id)
        try:
            may_begin = await self._journal.owner.may_begin(task)
        except asyncio.CancelledError:
            self._effects.release(task)
            raise
        if not may_begin:
            return _UNKNOWN
        try:
            value = await self._performed(guarded, task, attempt, attempts)
            output = _output(guarded, value)
        except asyncio.CancelledError:
            if not self._recorder.failed.done():  # a failed run ends, and the server notices
                given_up = self._effects.fail(task, "the program gave the call up", unknown=True)
                with self._recorder.servers_errors():
                    await asyncio.shield(asyncio.ensure_future(given_up))
            raise
        except Exception as error:
            cause = cause_of(error)
            with self._recorder.servers_errors():
                await self._effects.fail(task, str(cause) or type(cause).__name__, unknown=is_unknown(cause))
            if is_unknown(cause):
                return _UNKNOWN
            raise
        with self._recorder.servers_errors():
            completing = asyncio.ensure_future(self._effects.complete(task, output))
            try:
                await asyncio.shield(completing)
            except asyncio.CancelledError:
                if not self._recorder.failed.done():  # the effect has happened: its result must not be lost
                    await completing
                raise
        return value

    async def _performed(self, guarded: GuardedCall, task: Task, attempt: Attempt, attempts: Attempts) -> Any:
        """Do the work of one attempt: ask `reconcile` if needed, and make the call if nothing has happened."""
        if task.must_reconcile and (value := await self._reconciled(guarded)) is not NOT_DONE:
            return value
        try:
            return await attempts.make(partial(attempt, guarded.arguments))
        except Exception as error:
            if guarded.policy.reconcile is None or not is_unknown(cause_of(error)):
                raise
            value = await self._reconciled(guarded)
            if value is NOT_DONE:
                raise  # NOT_DONE isn't final here: the attempt may still be running
            return value

    async def _reconciled(self, guarded: GuardedCall) -> Any:
        """Ask the policy's `reconcile`; return the effect's result or NOT_DONE. Raises UnknownEffect if it fails."""
        try:
            answer = await guarded.policy.reconciled(guarded.arguments, call_id())
        except Exception as error:
            raise UnknownEffect(f"reconcile can't tell: {type(error).__name__}: {error}") from error
        done = "it has not happened" if answer is NOT_DONE else "it has happened"
        self._log.warning("%s may have happened in an earlier attempt; reconcile says: %s", guarded, done)
        return NOT_DONE if answer is NOT_DONE else guarded.tool.of_answer(answer)

    async def _resolved(self, guarded: GuardedCall, execution_id: str) -> Execution | None:
        """Wait until somebody has said what happened; return the ended execution. If nothing happened, return None.

        If an earlier run has left the effect unknown, `reconcile` is asked first, then a person.
        """
        look = partial(self._client.get_execution, execution_id, with_attempts=True, patience=OUTAGE_PATIENCE)
        with self._recorder.servers_errors():
            execution = (await look()).execution
            if _is_unresolved(execution) and execution_id not in self._attempted_effects:
                self._attempted_effects.add(execution_id)
                if guarded.policy.reconcile is not None and await self._resolve_by_reconcile(guarded, execution):
                    execution = (await look()).execution
            if _is_unresolved(execution):
                attempts = execution.nodes[0].attempts
                why = next((one.error for one in reversed(attempts) if one.error), "")
                line = (
                    f"{guarded} may or may not have happened{f' ({why})' if why else ''}. "
                    f"{how_to_resolve(execution_id, attempts[-1].attempt, self._client.servers)}"
                )
                with self._recorder.questions.waiting(guarded.call.address, line):
                    while _is_unresolved(execution):
                        execution = (await look(wait=RESOLVE_INTERVAL)).execution
        return execution if execution.status.ended else None

    async def _resolve_by_reconcile(self, guarded: GuardedCall, execution: Execution) -> bool:
        """Let `reconcile` say what happened in an earlier run; return False if a person has to say it."""
        try:
            value = await self._reconciled(guarded)
            answer = {"not_done": True} if value is NOT_DONE else {"output": _output(guarded, value)}
            # If another run has taken over, it may have made the call since `reconcile` looked.
            await self._recorder.before_attempt(guarded.call)
            attempt = execution.nodes[0].attempts[-1].attempt
            with suppress(Conflict):  # a person was faster
                await self._client.resolve(
                    execution.execution_id,
                    EFFECT,
                    resolved_by="reconcile",
                    attempt=attempt,
                    patience=OUTAGE_PATIENCE,
                    **answer,
                )
        except (UnknownEffect, ValueError, RoleRefused) as error:
            self._log.warning("%s: %s", guarded, error)
            return False
        return True

    # ---- Forks -------------------------------------------------------------------------------------------------------

    async def reused_result(self, guarded: GuardedCall) -> tuple[bool, Any]:
        """Return whether this session, as a fork, may reuse the result of an equal call; and that result.

        Each result is reused for one call only. Equal calls get the results in the order of the original calls.
        """
        client, session = self._client, self._journal.session
        with self._recorder.servers_errors():
            async with self._taking:
                if self._reusable is None:
                    self._reusable = await read_effects(client, reuse_prefix(session))
                own = self._input(guarded)
                equal = [(input, execution) for input, execution in self._reusable if input.digest == own.digest]
                if not equal:
                    return False, None
                before = await read_effects(client, effects_prefix(session))
                for input, execution in before:
                    if input.call == own.call and execution.status is ExecutionStatus.COMPLETED:
                        return True, _result(execution, guarded)
                taken = len({input.call for input, _ in before if input.digest == own.digest})
                if taken >= len(equal):
                    return False, None
                input, execution = equal[taken]
                output = jsontext.parse(execution.outputs()[EFFECT], "the result")
                input = input.model_copy(update={"session": session, "agent": own.agent, "call": own.call})
                await self._effects.record(input, output, input.key)
        self._log.info("%s: result of the session that this one was forked from ✓", guarded)
        return True, _result(execution, guarded)


def _is_unresolved(execution: Execution) -> bool:
    return not execution.status.ended and execution.nodes[0].status is NodeStatus.WAITING


def _output(guarded: GuardedCall, value: Any) -> dict[str, Any]:
    """Return the output of an effect with this result. Raises UnknownEffect if the result can't be recorded.

    The effect has happened then, and a person has to give a result that can be recorded.
    """
    try:
        return {RECORDED_RESULT: guarded.write(value)}
    except Exception as error:
        raise UnknownEffect(str(error) or type(error).__name__) from error


def _result(ended: Execution, guarded: GuardedCall) -> Any:
    if ended.status is not ExecutionStatus.COMPLETED:
        error = next((node.error for node in ended.nodes if node.error), ended.error)
        raise CallFailed(
            f"{guarded.call.tool} has failed, and is not called again, because its effect is once: {error}"
        )
    output = jsontext.parse(ended.outputs()[EFFECT], "the result")
    # A result that the tool returned is recorded in this form. Any other value is from a person (`nexum resolve`).
    if isinstance(output, dict) and output.keys() == {RECORDED_RESULT}:
        return guarded.tool.read(output[RECORDED_RESULT])
    return guarded.tool.of_answer(output)
