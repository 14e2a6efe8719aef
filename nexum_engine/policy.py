"""Policies: what has to happen before a tool runs, and when it may run again.

    Policy(approval=lambda cents, **_: cents > 10_000, effect="once", reconcile=find_charge)

A policy is data, apart from its functions. The same policy works for a worker's tool and for a tool that runs in a
durable run's process.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from nexum_engine import jsontext
from nexum_engine.errors import FinalError, InvalidRequest, first_problem
from nexum_engine.settings import Settings
from nexum_engine.workflow import MAX_SECONDS, Concurrency, Rate, RateOrText, RetryPolicy


class NotDone(Enum):
    """The type of NOT_DONE."""

    NOT_DONE = "not done"


NOT_DONE = NotDone.NOT_DONE
"""What `reconcile` returns if the effect has not happened: the tool then runs."""

Reconcile = Callable[[dict[str, Any], str], Any]


class Policy(Settings):
    """What has to happen before a tool runs, and when it may run again. Policies can also limit calls to a model."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    approval: Literal["always"] | Callable[..., bool] | None = None
    """Which calls a person has to approve: "always", or a function that gets the call's arguments by name."""
    approval_timeout: float | None = Field(default=None, gt=0, le=MAX_SECONDS)
    """Seconds after which a call that nobody has decided counts as rejected. None if it may wait for ever."""
    effect: Literal["idempotent", "once"] = "idempotent"
    """Whether the tool may run again if its result was lost. "idempotent": it may, with the same idempotency key.
    "once": it may not, because nobody can tell whether the effect has happened."""
    reconcile: Reconcile | None = None
    """For a "once" tool whose result was lost: a function, plain or async, that finds out what has happened.

    The function gets the call's arguments and idempotency key. It returns the tool's result or NOT_DONE, or raises an
    error if it can't tell. Without such a function, or if it raises, a person has to find out.
    """
    retry: RetryPolicy | None = None
    """When the tool runs again after it raised an error. Give a "once" tool a retry policy only if the tool's errors
    prove that nothing happened. Without a retry policy, a "once" tool has one attempt. For any other tool, the default
    depends on where the tool runs."""
    final: tuple[type[Exception], ...] = ()
    """Errors after which no retry follows."""
    timeout: float | None = Field(default=None, gt=0, le=MAX_SECONDS)
    """Seconds that one attempt may take."""
    heartbeat: float | None = Field(default=None, gt=0, le=MAX_SECONDS)
    """Seconds that one attempt may continue without a heartbeat: a call of `heartbeat()` in the tool, an item that the
    tool streams, or a part of a streamed model reply. The limit doesn't apply to other model replies."""
    rate: RateOrText | None = None
    """How often the tool may be called, retries included: for instance "10/min". The server counts the calls of all
    processes. A call above the rate waits."""
    concurrency: Concurrency | None = None
    """How many calls may run at the same time, in all processes together. Further calls wait."""

    @field_validator("approval", mode="plain")
    @classmethod
    def _check_approval(cls, value: object) -> object:
        if value in (None, "always") or (callable(value) and not inspect.iscoroutinefunction(value)):
            return value
        # pydantic's own message would not mention the function.
        raise PydanticCustomError("approval", "Input should be 'always' or, in a program, a plain function (not async)")

    @model_validator(mode="after")
    def _check(self) -> Policy:
        if self.reconcile is not None and self.effect != "once":
            raise ValueError('reconcile needs effect="once": an idempotent tool just runs again')
        if self.approval_timeout is not None and self.approval is None:
            raise ValueError("approval_timeout needs approval")
        return self

    @property
    def is_limited(self) -> bool:
        """Whether the policy has a limit (rate or concurrency) that a call may have to wait for."""
        return self.rate is not None or self.concurrency is not None

    @property
    def is_once(self) -> bool:
        """Whether the tool must not run again if its result was lost."""
        return self.effect == "once"

    def needs_approval(self, tool: str, arguments: Mapping[str, Any]) -> bool:
        """Return whether a person has to approve a call of `tool`. Raises FinalError if the policy's function fails."""
        if not callable(self.approval):
            return self.approval is not None
        try:
            return bool(self.approval(**arguments))
        except Exception as error:
            raise FinalError(
                f"the approval function of {tool} failed, so the call was not made: {type(error).__name__}: {error}"
            ) from error

    def described(self) -> dict[str, Any]:
        """Return the policy's fields as data, without those that have their default value.

        Functions and error classes are replaced by their names.
        """
        found: dict[str, Any] = {}
        for name in type(self).model_fields:
            value = getattr(self, name)
            if value != type(self).model_fields[name].default:
                found[name] = _described(value)
        return found

    async def reconciled(self, arguments: Mapping[str, Any], idempotency_key: str) -> Any:
        """Call `reconcile`; return its answer. A plain function runs in a thread. Raises what `reconcile` raises."""
        if self.reconcile is None:
            raise InvalidRequest("the policy has no reconcile function")
        if inspect.iscoroutinefunction(self.reconcile):
            return await self.reconcile(dict(arguments), idempotency_key)
        answer = await asyncio.to_thread(self.reconcile, dict(arguments), idempotency_key)
        return await answer if inspect.isawaitable(answer) else answer


def _described(value: Any) -> Any:
    if isinstance(value, Rate):
        return str(value)
    if isinstance(value, BaseModel):
        return value.model_dump()
    if isinstance(value, tuple):
        return [_described(one) for one in value]
    return getattr(value, "__name__", type(value).__name__) if callable(value) else value


def call_digest(tool: str, arguments: Mapping[str, Any]) -> str:
    """Return the SHA-256, in hex, of a tool's name and a call's arguments, defaults included.

    Raises InvalidRequest if the arguments can't be written as JSON.
    """
    return hashlib.sha256(jsontext.dump([tool, _sorted(arguments)], f"a call of {tool}").encode()).hexdigest()


def _sorted(value: Any) -> Any:
    """Return a copy of a JSON-like value, with the names of each object sorted."""
    if isinstance(value, Mapping):
        return {name: _sorted(value[name]) for name in sorted(value)}
    return [_sorted(one) for one in value] if isinstance(value, (list, tuple)) else value


def read_policies(file: Path) -> dict[str, Policy]:
    """Return the policies of a TOML file: a table for each tool, with the fields of Policy that are data.

    Raises InvalidRequest, which names the file and the field.
    """
    try:
        # Python 3.10 has no tomllib. The package tomli is the same module.
        tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    except ModuleNotFoundError:
        raise InvalidRequest(f"Python 3.10 needs the package tomli to read {file}: pip install tomli") from None
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidRequest(f"the policies {file} can't be read: {error.strerror or error}") from error
    except ValueError as error:
        raise InvalidRequest(f"{file} is not TOML: {error}") from error
    found = {}
    for tool, table in tables.items():
        if not isinstance(table, dict):
            raise InvalidRequest(f"{file}: {tool} must be a table: [{tool}]")
        try:
            found[tool] = Policy.model_validate(table)
        except ValidationError as error:
            raise InvalidRequest(f"{file}: {first_problem(error, tool)}") from error
    return found
