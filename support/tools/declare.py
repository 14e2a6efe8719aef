"""Declare tools. A tool has a function, a model of the function's arguments, a time limit and a policy."""

from __future__ import annotations

import inspect
import json
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from nexum_engine.deadline import Deadline
from nexum_engine.errors import FinalError, InvalidRequest, UnknownEffect
from nexum_engine.policy import NOT_DONE, Policy, Reconcile
from nexum_engine.records import DeclaredTool
from nexum_engine.workflow import Rate, RetryPolicy
from support.tools.arguments import validate_leniently
from support.tools.clean_text import shortened
from support.tools.contain import StillRunning, run_contained
from support.tools.web import Web

DEFAULT_TIME_LIMIT = 60.0  # seconds
NO_POLICY = Policy()


class ToolTimeout(TimeoutError):
    """A tool exceeded its time limit, or sent no heartbeat in time. The attempt fails; a retry may succeed."""


@dataclass(frozen=True)
class ToolContext:
    """The values that a tool gets in addition to the arguments from the model."""

    idempotency_key: str  # the same at every attempt, so that a service that the tool calls can recognize a retry
    attempt: int  # from 1
    web: Web
    heartbeat: Callable[[object], None] = lambda _: None
    """Say how far the tool is, with a small JSON value: `nexum show` prints it. May be called from any thread."""


@dataclass(frozen=True)
class Tool:
    """A declared tool. `arguments` is a strict Pydantic model that forbids unknown names."""

    name: str
    description: str
    arguments: type[BaseModel]
    time_limit: float  # seconds
    function: Callable[..., object]
    signature: str
    context_parameter: str | None
    policy: Policy

    @classmethod
    def from_function(
        cls, function: Callable[..., object], *, time_limit: float = DEFAULT_TIME_LIMIT, policy: Policy = NO_POLICY
    ) -> Tool:
        """Make a tool from a function. Raises TypeError or ValueError if no model could call the function."""
        name = function.__name__
        description = inspect.getdoc(function)
        if not description:
            raise TypeError(f"tool {name} needs a docstring: it is what the model sees")
        if not time_limit > 0:
            raise ValueError(f"tool {name}: time_limit must be above 0 seconds, not {time_limit!r}")
        if policy.heartbeat is not None and policy.heartbeat >= time_limit:
            raise ValueError(
                f"tool {name}: heartbeat={policy.heartbeat:g} has no effect, because time_limit is {time_limit:g} s: "
                "give a longer time_limit"
            )
        hints = typing.get_type_hints(function, include_extras=True)
        context_parameter: str | None = None
        fields: dict[str, Any] = {}
        shown: list[str] = []
        for parameter in inspect.signature(function).parameters.values():
            if parameter.name not in hints:
                raise TypeError(f"tool {name}: parameter {parameter.name} needs a type hint")
            hint = hints[parameter.name]
            if hint is ToolContext:
                if parameter.kind is not parameter.KEYWORD_ONLY:
                    raise TypeError(f"tool {name}: write `*, {parameter.name}: ToolContext`, keyword-only")
                context_parameter = parameter.name
                continue
            if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                raise TypeError(f"tool {name}: parameter {parameter.name} can't be passed by name")
            required = parameter.default is parameter.empty
            fields[parameter.name] = (hint, ... if required else parameter.default)
            default = "" if required else f" = {parameter.default!r}"
            shown.append(f"{parameter.name}: {_type_name(hint)}{default}")
        arguments = create_model(
            f"{name}_arguments", __config__=ConfigDict(extra="forbid", strict=True, protected_namespaces=()), **fields
        )
        return cls(
            name=name,
            description=description,
            arguments=arguments,
            time_limit=float(time_limit),
            function=function,
            signature=f"{name}({', '.join(shown)})",
            context_parameter=context_parameter,
            policy=policy,
        )

    @property
    def declaration(self) -> str:
        """The time limit and the policy, as the tool's declaration gives them."""
        given = {"time_limit": f"{self.time_limit:g}", **self.policy.described()}
        return ", ".join(f"{name}={value}" for name, value in given.items())

    @property
    def declared(self) -> DeclaredTool:
        """The tool as `nexum tools` lists it."""
        return DeclaredTool(
            self.name, self.signature, json.dumps({"time_limit": self.time_limit, **self.policy.described()})
        )

    def validate(self, arguments: object) -> dict[str, Any]:
        """Return the checked arguments of a call. Raises FinalError with one message that the model can act on."""
        checked = self._checked(arguments)
        return {name: getattr(checked, name) for name in self.arguments.model_fields}

    def complete(self, arguments: object) -> dict[str, Any]:
        """Return the checked arguments as JSON values, with the defaults filled in. Raises what `validate` raises."""
        return self._checked(arguments).model_dump(mode="json")

    def _checked(self, arguments: object) -> BaseModel:
        try:
            if not isinstance(arguments, Mapping):
                raise TypeError("the arguments must be a JSON object")
            # Validate as JSON: in JSON, strict mode accepts a list for a tuple, but never a text for an int.
            text = json.dumps(dict(arguments), allow_nan=False, ensure_ascii=False).encode()
            return validate_leniently(self.arguments, text)
        except ValidationError as invalid:
            causes = "; ".join(_cause(error) for error in invalid.errors(include_url=False))
            raise self._wrong(causes) from None
        except (TypeError, ValueError, RecursionError) as error:
            raise self._wrong(f"{error} (given: {shortened(arguments)})") from None

    def _wrong(self, causes: str) -> FinalError:
        return FinalError(f"{self.name} was called with wrong arguments: {causes}. Call it as {self.signature}")

    async def run(self, arguments: object, context: ToolContext, *, must_reconcile: bool = False) -> str:
        """Check the arguments, run the function within the time limit, and return its result as text.

        With `must_reconcile`, first ask the policy's `reconcile` for the result of an attempt that was lost. Raises
        UnknownEffect if it can't be found out whether a "once" tool has had its effect.
        """
        keywords = self.validate(arguments)
        if must_reconcile:
            found = await self._reconciled(arguments, context.idempotency_key)
            if found is not NOT_DONE:
                return self.as_text(found)
        deadline = Deadline(self.time_limit, self.policy.heartbeat)

        def beat(progress: object) -> None:
            deadline.beat()
            context.heartbeat(progress)

        if self.context_parameter is not None:
            keywords[self.context_parameter] = replace(context, heartbeat=beat)
        try:
            result = await run_contained(partial(self.function, **keywords), self.name, deadline)
        except StillRunning:
            late = ToolTimeout(f"{self.name} {deadline.exceeded()}")
            return await self._late_result(late, arguments, context.idempotency_key)
        except self.policy.final as error:
            raise FinalError(f"{type(error).__name__}: {error}") from error
        return self.as_text(result)

    async def _late_result(self, late: ToolTimeout, arguments: object, idempotency_key: str) -> str:
        """Return the result of an attempt that ran out of time, if `reconcile` finds it. Otherwise raise an error."""
        if not self.policy.is_once:
            raise late
        found = NOT_DONE if self.policy.reconcile is None else await self._reconciled(arguments, idempotency_key)
        if found is NOT_DONE:  # NOT_DONE proves nothing here, because the function is still running
            raise UnknownEffect(f"{late}, and may still have its effect")
        return self.as_text(found)

    async def _reconciled(self, arguments: object, idempotency_key: str) -> object:
        reconcile = partial(self.policy.reconciled, self.complete(arguments), idempotency_key)
        try:
            return await run_contained(reconcile, f"reconcile of {self.name}", Deadline(self.time_limit))
        except StillRunning:
            raise UnknownEffect(f"reconcile of {self.name} took longer than {self.time_limit:g} s") from None
        except Exception as error:
            raise UnknownEffect(f"reconcile of {self.name} failed: {type(error).__name__}: {error}") from error

    def as_text(self, result: object) -> str:
        """Return a result as the model reads it: a text as it is, and any other value as JSON."""
        if not isinstance(result, str):
            try:
                result = json.dumps(result, ensure_ascii=False, allow_nan=False)
            except (TypeError, ValueError, RecursionError) as error:
                kind = type(result).__name__
                raise FinalError(f"{self.name} returned a {kind}, which is neither text nor JSON ({error})") from error
        # Replace lone surrogates, because UTF-8 can't encode them.
        return result.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


TOOLS: dict[str, Tool] = {}
"""All declared tools, by name."""


def tool(
    *,
    time_limit: float = DEFAULT_TIME_LIMIT,
    approval: Literal["always"] | Callable[..., bool] | None = None,
    approval_timeout: float | None = None,
    effect: Literal["idempotent", "once"] = "idempotent",
    reconcile: Reconcile | None = None,
    retry: RetryPolicy | None = None,
    final: tuple[type[Exception], ...] = (),
    heartbeat: float | None = None,
    rate: Rate | str | None = None,
    concurrency: int | None = None,
) -> Callable[[Callable[..., object]], Tool]:
    """Return a decorator that declares a function as a tool. `Policy` describes the arguments after `time_limit`."""

    def declare(function: Callable[..., object]) -> Tool:
        try:
            policy = Policy(
                approval=approval,
                approval_timeout=approval_timeout,
                effect=effect,
                reconcile=reconcile,
                retry=retry,
                final=final,
                heartbeat=heartbeat,
                rate=rate,
                concurrency=concurrency,
            )
        except InvalidRequest as invalid:
            raise ValueError(f"tool {function.__name__}: {invalid}") from None
        declared = Tool.from_function(function, time_limit=time_limit, policy=policy)
        if declared.name in TOOLS:
            raise ValueError(f"two tools are named {declared.name}: rename one of them")
        TOOLS[declared.name] = declared
        return declared

    return declare


def find_tool(name: str) -> Tool:
    """Return the tool with the name. If there is none, raise FinalError with the names of all tools."""
    if name not in TOOLS:
        raise FinalError(f"there is no tool named {shortened(name)}; the tools are {', '.join(sorted(TOOLS))}")
    return TOOLS[name]


def _type_name(hint: Any) -> str:
    plain = hint.__origin__ if typing.get_origin(hint) is typing.Annotated else hint
    return inspect.formatannotation(plain)


def _cause(error: Any) -> str:
    path = ".".join(str(part) for part in error["loc"])
    match error["type"]:
        case "missing":
            return f"{path} is missing"
        case "extra_forbidden":
            return f"there is no argument {shortened(path)}"
        case _ if not path:
            return str(error["msg"])
        case _:
            return f"{path}: {error['msg']} (given: {shortened(error['input'])})"
