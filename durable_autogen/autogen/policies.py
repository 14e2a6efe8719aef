"""Policies of AutoGen's tools: the function `durable_tool`, and helpers that read a tool's names and arguments."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Concatenate, ParamSpec
from weakref import WeakKeyDictionary

from autogen_agentchat.tools import AgentTool, TeamTool
from autogen_core import CancellationToken
from autogen_core.tools import BaseTool, FunctionTool, StaticWorkbench, TextResultContent, ToolResult, Workbench
from pydantic import BaseModel, ValidationError

from durable_autogen.autogen.values import adapted, value_again
from durable_autogen.errors import NotDurable
from durable_autogen.record.place import Place
from nexum_engine import jsontext
from nexum_engine.errors import InvalidRequest
from nexum_engine.policy import Policy

P = ParamSpec("P")
AnyTool = Callable[..., Any] | BaseTool[Any, Any]


@dataclass
class CallUnderPolicy:
    """A call in progress whose tool has a policy: the tool's names, and the exceptions that the tool has raised.

    AutoGen's workbenches turn the exceptions into texts. They may also show a tool under another name.
    """

    names: frozenset[str]
    raised: list[Exception] = field(default_factory=list)


call_under_policy: ContextVar[CallUnderPolicy | None] = ContextVar("durable_policy", default=None)

_own: WeakKeyDictionary[BaseTool[Any, Any], Policy] = WeakKeyDictionary()


@contextmanager
def inside_a_call(tool: BaseTool[Any, Any], place: Place | None) -> Iterator[None]:
    """Note the exception of a tool that runs in the `with`: the policy of the recorded call needs the exception.

    Raises NotDurable if the tool has a policy with an approval or with the effect "once", but the recorded call is not
    a call of this tool. The recorded call would not apply the tool's policy.
    """
    call = call_under_policy.get()
    if place is not None and (call is None or tool.name not in call.names):
        policy = place.session.guard.of_tool(tool.name, own=_own.get(tool))
        if policy is not None and (policy.approval is not None or policy.is_once):
            raise NotDurable(
                f"{tool.name} has a policy, so it can't be called inside another tool: let the program or an agent "
                "call it"
            )
    try:
        yield
    except Exception as error:
        if call is not None:
            call.raised.append(error)
        raise


def _with_fields_of(
    policy: Callable[P, Policy],
) -> Callable[[Callable[..., BaseTool[Any, Any]]], Callable[Concatenate[AnyTool, P], BaseTool[Any, Any]]]:
    """Return a decorator that gives a function, after its first parameter, the parameters of `policy`."""

    def decorate(function: Any) -> Any:
        shown = inspect.signature(function)
        first, *_ = shown.parameters.values()
        fields = inspect.signature(policy).parameters.values()
        function.__signature__ = shown.replace(parameters=[first, *fields])
        return function

    return decorate


@_with_fields_of(Policy)
def durable_tool(tool: AnyTool, **policy: Any) -> BaseTool[Any, Any]:
    """Return a tool that carries a policy: a new FunctionTool for a function, or the given tool.

        charge = durable_tool(charge, approval=lambda cents, **_: cents > 10_000, effect="once")

    The arguments are the fields of Policy. In a durable run, the policy applies to each call of the tool. If the
    session has a policy for the tool's name, the session's policy applies instead. Outside of a durable run, the
    policy has no effect.

    Raises InvalidRequest for a wrong policy, and for an agent or team as a tool.
    """
    checked = Policy(**policy)
    if not isinstance(tool, BaseTool):
        tool = FunctionTool(tool, description=inspect.getdoc(tool) or "")
    if isinstance(tool, (AgentTool, TeamTool)):
        raise InvalidRequest(f"{tool.name} is an agent or team as a tool: give the policies to the tools inside it")
    _own[tool] = checked
    return tool


def static_tool(workbench: Workbench, name: str) -> BaseTool[Any, Any] | None:
    """Return the tool object that a StaticWorkbench shows as `name`. Return None for other workbenches."""
    if not isinstance(workbench, StaticWorkbench):
        return None
    original = workbench._override_name_to_original.get(name, name)
    return next((tool for tool in workbench._tools if tool.name == original), None)


@dataclass(frozen=True)
class ToolCall:
    """A tool call: the tool's name, the arguments, and what else the caller passed.

    The guard of a call under a policy gets it as a `CalledTool` (guard.py).
    """

    name: str
    arguments: Mapping[str, Any]
    token: CancellationToken | None
    call_id: str | None
    tool: BaseTool[Any, Any] | None
    """The called tool. None if only the workbench has it, as with an MCP server's tool."""
    workbench: Workbench | None = None
    """The workbench that contains the tool; None if the tool was called directly."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the tool: the name under which it is called and, if that differs, its own name."""
        return (self.name,) if self.tool is None or self.tool.name == self.name else (self.name, self.tool.name)

    @property
    def result_type(self) -> Any:
        """The type of the call's result: ToolResult in a workbench, else the type that the tool declares."""
        return ToolResult if self.workbench is not None or self.tool is None else self.tool.return_type()

    @property
    def own_policy(self) -> Policy | None:
        """The policy that `durable_tool` gave to the tool; None if it gave none."""
        return None if self.tool is None or not _own else _own.get(self.tool)

    async def checked(self, arguments: Mapping[str, Any], *, will_run: bool) -> dict[str, Any]:
        """Return validated arguments as JSON, with the defaults filled in.

        Raises ValidationError for wrong arguments of a tool or of a StaticWorkbench. Other workbenches, such as an MCP
        server's, check the arguments only when a tool is called. If `will_run` is true, the tool will get the returned
        arguments, and NotDurable is raised if JSON can't hold one of them, such as a SecretStr. Then InvalidRequest is
        raised if an argument can't be written as JSON, such as NaN or a lone surrogate.
        """
        found = await self._complete(arguments, will_run=will_run)
        if will_run:
            jsontext.dump(found, f"the arguments of {self.name}")
        return found

    async def _complete(self, arguments: Mapping[str, Any], *, will_run: bool) -> dict[str, Any]:
        if self.tool is not None:
            kind = self.tool.args_type()
            validated = kind.model_validate(arguments)
            found: dict[str, Any] = validated.model_dump(mode="json", by_alias=True)
            if will_run and not _is_same(kind, found, validated):
                raise NotDurable(
                    f"the arguments of {self.name} can't be shown and recorded, because JSON doesn't hold all of them "
                    "(a SecretStr, for instance): change their types, or give the tool a policy without approval and "
                    "once"
                )
            return found
        assert self.workbench is not None
        schema = next((one for one in await self.workbench.list_tools() if one["name"] == self.name), None)
        properties: Mapping[str, Any] = {} if schema is None else schema.get("parameters", {}).get("properties", {})
        defaults = {one: field["default"] for one, field in properties.items() if "default" in field}
        return {**defaults, **arguments}

    def fits(self, complete: Mapping[str, Any]) -> bool:
        """Return whether `complete` are this call's arguments with defaults. The defaults may be others than now."""
        given = {**complete, **self.arguments}
        return given == complete if self.tool is None else _is_same(self.tool.args_type(), given, complete)

    def read(self, written: Any) -> Any:
        """Return the result of a call from the JSON in which it is recorded.

        A person may have given a result that looks like such JSON, and has another type. It becomes a ToolResult, too.
        """
        value = value_again(written, self.result_type)
        return self.of_answer(value) if self.result_type is ToolResult else value

    def of_answer(self, answer: Any) -> Any:
        """Turn an answer of `reconcile` or of a person (a value of the tool's type, or any JSON) into a tool result."""
        if self.result_type is not ToolResult:
            return adapted(self.result_type, answer)
        if isinstance(answer, ToolResult):
            return answer
        if isinstance(answer, str):
            text = answer
        elif self.tool is None or isinstance(answer, (dict, list)):
            text = json.dumps(answer, ensure_ascii=False, default=str)
        else:
            text = self.tool.return_value_as_string(answer)
        return ToolResult(name=self.name, result=[TextResultContent(content=text)])


def _is_same(kind: type[BaseModel], one: Mapping[str, Any], other: BaseModel | Mapping[str, Any]) -> bool:
    """Return whether a model of this kind has equal fields from `one` and from `other`."""
    try:
        return bool(kind.model_validate(one) == kind.model_validate(other))
    except ValidationError:
        return False


def with_note(value: Any, note: str) -> Any:
    """Return a ToolResult with `note`, a line for the model, before it. Return any other value unchanged."""
    if not note or not isinstance(value, ToolResult):
        return value
    return value.model_copy(update={"result": [TextResultContent(content=note), *value.result]})
