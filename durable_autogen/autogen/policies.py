"""Policies of AutoGen's tools: the function `durable_tool`, and helpers that read a tool's names and arguments."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from autogen_agentchat.tools import AgentTool, TeamTool
from autogen_core.tools import BaseTool, FunctionTool, StaticWorkbench, TextResultContent, ToolResult, Workbench
from pydantic import BaseModel, TypeAdapter, ValidationError

from durable_autogen.autogen.values import value_again
from durable_autogen.errors import NotDurable
from durable_autogen.record.place import Place
from nexum_engine.errors import InvalidRequest, first_problem
from nexum_engine.policy import Policy


@dataclass
class UnderPolicy:
    """A call in progress whose tool has a policy: the tool's names, and the exceptions that the tool has raised.

    AutoGen's workbenches turn the exceptions into texts. They may also show a tool under another name.
    """

    names: frozenset[str]
    raised: list[Exception] = field(default_factory=list)


under_policy: ContextVar[UnderPolicy | None] = ContextVar("durable_policy", default=None)

_own: WeakKeyDictionary[BaseTool[Any, Any], Policy] = WeakKeyDictionary()


@contextmanager
def inside_a_call(tool: BaseTool[Any, Any], place: Place | None) -> Iterator[None]:
    """Note the exception of a tool that runs in the `with`: the policy of the recorded call needs the exception.

    Raises NotDurable if the tool has a policy with an approval or with the effect "once", but the recorded call is not
    a call of this tool. The recorded call would not apply the tool's policy.
    """
    call = under_policy.get()
    if place is not None and (call is None or tool.name not in call.names):
        policy = place.session.guard.of_tool(tool.name, own=own_policy(tool, tool.name))
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


def durable_tool(tool: Callable[..., Any] | BaseTool[Any, Any], **policy: Any) -> BaseTool[Any, Any]:
    """Return a tool that carries a policy: a new FunctionTool for a function, or the given tool.

        charge = durable_tool(charge, approval=lambda cents, **_: cents > 10_000, effect="once")

    The arguments are the fields of Policy. In a durable run, the policy applies to each call of the tool. If the
    session has a policy for the tool's name, the session's policy applies instead. Outside of a durable run, the
    policy has no effect.

    Raises InvalidRequest for a wrong policy, and for an agent or team as a tool.
    """
    try:
        checked = Policy(**policy)
    except ValidationError as error:
        raise InvalidRequest(f"durable_tool: {first_problem(error)}") from error
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


def names_of(source: BaseTool[Any, Any] | Workbench, name: str) -> tuple[str, ...]:
    """Return the names of a tool: the name under which it is called and, if that differs, its own name."""
    tool = static_tool(source, name) if isinstance(source, Workbench) else source
    return (name,) if tool is None or tool.name == name else (name, tool.name)


def own_policy(source: BaseTool[Any, Any] | Workbench, name: str) -> Policy | None:
    """Return the policy that `durable_tool` gave to a tool or to a workbench's tool; None if it gave none."""
    if not _own:
        return None
    tool = source if isinstance(source, BaseTool) else static_tool(source, name)
    return None if tool is None else _own.get(tool)


async def checked_arguments(
    source: BaseTool[Any, Any] | Workbench, name: str, arguments: Mapping[str, Any], *, will_run: bool
) -> dict[str, Any]:
    """Return a call's validated arguments as JSON, with the defaults filled in.

    Raises ValidationError for wrong arguments of a tool or of a StaticWorkbench. Other workbenches, such as an MCP
    server's, check the arguments only when a tool is called. If `will_run` is true, the tool will get the returned
    arguments, and NotDurable is raised if JSON can't hold one of them, such as a SecretStr.
    """
    tool = source if isinstance(source, BaseTool) else static_tool(source, name)
    if tool is not None:
        kind = tool.args_type()
        validated = kind.model_validate(arguments)
        found: dict[str, Any] = validated.model_dump(mode="json", by_alias=True)
        if will_run and not _is_same(kind, found, validated):
            raise NotDurable(
                f"the arguments of {name} can't be shown and recorded, because JSON doesn't hold all of them (a "
                "SecretStr, for instance): change their types, or give the tool a policy without approval and once"
            )
        return found
    assert isinstance(source, Workbench)
    schema = next((one for one in await source.list_tools() if one["name"] == name), None)
    properties: Mapping[str, Any] = {} if schema is None else schema.get("parameters", {}).get("properties", {})
    defaults = {one: field["default"] for one, field in properties.items() if "default" in field}
    return {**defaults, **arguments}


def _is_same(kind: type[BaseModel], written: Mapping[str, Any], validated: BaseModel) -> bool:
    try:
        return bool(kind.model_validate(written) == validated)
    except ValidationError:
        return False


def differs_in_defaults(
    source: BaseTool[Any, Any] | Workbench, name: str, given: Mapping[str, Any], complete: Mapping[str, Any]
) -> bool:
    """Return whether `complete` are the arguments `given` with defaults. A default may differ at each call."""
    tool = source if isinstance(source, BaseTool) else static_tool(source, name)
    if tool is None:
        return {**complete, **given} == complete
    kind = tool.args_type()
    try:
        return bool(kind.model_validate({**complete, **given}) == kind.model_validate(complete))
    except ValidationError:
        return False


class ToolForm:
    """The recorded form of a tool's results. `write` turns a result into JSON."""

    def __init__(
        self, source: BaseTool[Any, Any] | Workbench, name: str, declared: Any, write: Callable[[Any], Any]
    ) -> None:
        self._tool = source if isinstance(source, BaseTool) else static_tool(source, name)
        self._name = name
        self._declared = declared
        self.write = write

    def read(self, written: Any) -> Any:
        """Return the result from the JSON that `write` returned."""
        return value_again(written, self._declared)

    def of_answer(self, answer: Any) -> Any:
        """Turn an answer of `reconcile` or of a person (a value of the tool's type, or any JSON) into a tool result."""
        if self._declared is not ToolResult:
            try:
                return TypeAdapter(self._declared).validate_python(answer)
            except Exception:  # noqa: BLE001 - pydantic doesn't know the type, or the value doesn't match
                return answer
        if isinstance(answer, ToolResult):
            return answer
        if isinstance(answer, str):
            text = answer
        elif self._tool is None or isinstance(answer, (dict, list)):
            text = json.dumps(answer, ensure_ascii=False, default=str)
        else:
            text = self._tool.return_value_as_string(answer)
        return ToolResult(name=self._name, result=[TextResultContent(content=text)])


def with_note(value: Any, note: str) -> Any:
    """Return a ToolResult with `note`, a line for the model, before it. Return any other value unchanged."""
    if not note or not isinstance(value, ToolResult):
        return value
    return value.model_copy(update={"result": [TextResultContent(content=note), *value.result]})
