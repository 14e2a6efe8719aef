"""Workflows as data: the builder, the intermediate representation (IR) that the server gets, and the version hash.

    PIPELINE = (
        workflow("research-pipeline")
        .effect("research", Claims)
        .effect("report", Report)
        .build()
    )

The IR has a published server's format: `{"nodes": {id: {"type": "EFFECT", "dependencies": [id, ...], ...}}}`. The
fields `event`, `on_timeout`, `timeout_seconds`, `retry_policy`, `effect`, `reconcile`, `rate` and `concurrency` are
additions of this project.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError, model_validator

from nexum_engine import jsontext
from nexum_engine.errors import InvalidRequest, first_problem
from nexum_engine.records import Compatibility, NodeType
from nexum_engine.settings import Settings

MAX_IR_BYTES = 1024 * 1024
MAX_NODES = 1000
MAX_DEPENDENCIES = 10_000  # of all nodes together
MAX_ID_LENGTH = 200  # characters
MAX_ATTRIBUTES = 10  # of one execution
MAX_ATTRIBUTE_NAME = 64  # characters
MAX_SECONDS = 100 * 366 * 24 * 3600
"""The longest delay or time limit: about 100 years. Some systems can't show a much later time."""

Number = Annotated[int, Strict()] | Annotated[float, Strict()]
_KNOWN_TYPES = tuple(one.value for one in NodeType if one is not NodeType.MAP_SUBTASK)


class Route(Settings):
    """A target that a ROUTER node can choose. The server doesn't read `condition`: the worker's handler decides."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    condition: str = ""
    target: str


class RetryPolicy(Settings):
    """When a node is retried after a reported failure. A published server has the same defaults."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    max_attempts: int = Field(default=4, ge=1, le=1000)
    """The number of reported failures after which the node is FAILED."""
    first_delay_seconds: float = Field(default=1.0, ge=0, le=MAX_SECONDS)
    factor: float = Field(default=2.0, ge=1, le=100)
    """How many times longer each delay is than the one before."""
    max_delay_seconds: float = Field(default=MAX_SECONDS, ge=0, le=MAX_SECONDS)
    jitter: float = Field(default=0, ge=0, le=1)
    """The share of each delay that is random: with 0.5, a delay is shortened by up to a half."""

    def delay_ms(self, failed_attempts: int) -> int | None:
        """Return the wait before the next attempt, in ms. Return None after the last attempt."""
        if failed_attempts >= self.max_attempts:
            return None
        try:
            delay = self.first_delay_seconds * self.factor ** (failed_attempts - 1)
        except OverflowError:
            delay = self.max_delay_seconds
        return round(min(delay, self.max_delay_seconds) * (1 - self.jitter * random.random()) * 1000)


DEFAULT_RETRY_POLICY = RetryPolicy()
ONE_ATTEMPT = RetryPolicy(max_attempts=1)
"""The default if an effect must happen only once: a reported failure doesn't prove that nothing happened."""


_UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


class Rate(Settings):
    """How often something may happen: a token bucket of `calls` tokens. An empty bucket is full after `seconds`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    calls: int = Field(ge=1, le=1_000_000)
    seconds: float = Field(gt=0, le=MAX_SECONDS)

    @model_validator(mode="before")
    @classmethod
    def _parse(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        found = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+(?:\.\d+)?)?\s*(s|min|h|d)\s*", value, re.ASCII)
        if found is None:
            raise ValueError(f"{value!r} is not a rate: use, for instance, 10/s, 10/min, 500/h or 3/10s")
        calls, length, unit = found.groups()
        return {"calls": int(calls), "seconds": float(length or 1) * _UNITS[unit]}

    @classmethod
    def parse(cls, text: str) -> Rate:
        """Return the rate that a text like 10/s, 10/min, 500/h or 3/10s describes. Raises InvalidRequest."""
        try:
            return cls.model_validate(text)
        except ValidationError as error:
            raise InvalidRequest(first_problem(error, "rate")) from error

    def __str__(self) -> str:
        unit = next((unit for unit, seconds in _UNITS.items() if seconds == self.seconds), None)
        return f"{self.calls}/{unit or f'{self.seconds:.15g}s'}"


Concurrency = Annotated[int, Strict(), Field(ge=1, le=1_000_000)]
"""How many attempts may run at the same time."""


@dataclass(frozen=True)
class NodeDefinition:
    """A node of a workflow. `output` is the model that the worker checks results with. The server never sees it."""

    node_id: str
    node_type: NodeType
    dependencies: tuple[str, ...]
    output: type[BaseModel] | None = None
    routes: tuple[Route, ...] = ()
    """The targets of a ROUTER node."""
    map_node_id: str = ""
    """The MAP node whose results a REDUCE node reads."""
    sub_workflow_id: str = ""
    """The workflow that a SUBWORKFLOW node starts."""
    delay_seconds: float = 0
    """How long a TIMER node waits."""
    event: str = ""
    """The name of the event that an EVENT node waits for."""
    on_timeout: str = ""
    """The node that runs only if the event of an EVENT node does not come in time."""
    timeout_seconds: float | None = None
    """How long one attempt at a task may take, or how long an EVENT or HUMAN_APPROVAL node waits."""
    retry: RetryPolicy = DEFAULT_RETRY_POLICY
    once: bool = False
    """Whether the effect of an EFFECT node must happen only once: an attempt that may have begun is not repeated."""
    reconcile: bool = False
    """With `once`: whether the node's handler can find out if the effect of an earlier attempt has happened."""
    rate: Rate | None = None
    """How often the node may be handed out, counted over all executions of the workflow. None for no limit."""
    concurrency: int | None = None
    """How many attempts at the node may run at the same time, in all executions of the workflow. None for no limit."""

    @property
    def is_limited(self) -> bool:
        """Whether the node has a rate or a concurrency limit, which may hold the node back while it is READY."""
        return self.rate is not None or self.concurrency is not None

    @property
    def targets(self) -> tuple[str, ...]:
        """The nodes that run only if this node chooses them."""
        return (self.on_timeout,) if self.on_timeout else tuple(route.target for route in self.routes)

    def ir(self) -> dict[str, object]:
        """Return the node's part of the IR. A field that has its default is left out."""
        fields: dict[str, object] = {"type": self.node_type.value, "dependencies": list(self.dependencies)}
        if self.routes:
            fields["routes"] = [route.model_dump() for route in self.routes]
        if self.map_node_id:
            fields["mapNodeId"] = self.map_node_id
        if self.sub_workflow_id:
            fields["subWorkflowId"] = self.sub_workflow_id
        if self.node_type is NodeType.TIMER:
            fields["delay_seconds"] = self.delay_seconds
        if self.event:
            fields["event"] = self.event
        if self.on_timeout:
            fields["on_timeout"] = self.on_timeout
        if self.timeout_seconds is not None:
            fields["timeout_seconds"] = self.timeout_seconds
        if self.retry != default_retry(self.once):
            # Leave out a jitter of 0: servers without this field refuse it.
            fields["retry_policy"] = self.retry.model_dump(exclude=None if self.retry.jitter else {"jitter"})
        if self.once:
            fields["effect"] = "once"
        if self.reconcile:
            fields["reconcile"] = True
        if self.rate is not None:
            fields["rate"] = self.rate.model_dump()
        if self.concurrency is not None:
            fields["concurrency"] = self.concurrency
        return fields


def default_retry(once: bool) -> RetryPolicy:
    """Return the retry policy of a node whose definition gives none."""
    return ONE_ATTEMPT if once else DEFAULT_RETRY_POLICY


@dataclass(frozen=True)
class Workflow:
    """A built workflow, ready to be registered. The client checks the input of executions with the model `input`."""

    workflow_id: str
    version_hash: str
    ir_json: str
    nodes: tuple[NodeDefinition, ...]
    input: type[BaseModel] | None = None

    def __str__(self) -> str:
        """Return the workflow as text for a person: the id, the version, and a line for each node."""
        lines = [f"{self.workflow_id} {self.version_hash}"]
        for node in self.nodes:
            after = f" after {', '.join(node.dependencies)}" if node.dependencies else ""
            lines.append(f"    {node.node_id} {node.node_type.value}{after}")
        return "\n".join(lines)


class WorkflowBuilder:
    """A builder of a workflow. Its method `build` checks the nodes and computes the version hash."""

    def __init__(self, workflow_id: str, input: type[BaseModel] | None = None) -> None:
        self._workflow_id = workflow_id
        self._input = input
        self._nodes: list[NodeDefinition] = []

    def effect(
        self,
        node_id: str,
        output: type[BaseModel] | None = None,
        *,
        depends_on: Sequence[str] | None = None,
        timeout_seconds: float | None = None,
        retry: RetryPolicy | None = None,
        once: bool = False,
        reconcile: bool = False,
        rate: Rate | str | None = None,
        concurrency: int | None = None,
    ) -> WorkflowBuilder:
        """Add a node that acts on the outside world. Without `depends_on` it depends on every node added before it.

        An attempt that takes longer than `timeout_seconds` counts as failed or, with `once`, as one without a report.
        `retry` says when the node is retried after a reported failure.

        With `once`, if an attempt may have begun and ends without a report, the node is not handed out again: it waits
        for a person (`nexum unknown`). With `reconcile`, the handler gets another attempt instead, in which
        `task.must_reconcile` is true: the handler first finds out whether the effect has happened. With `once`, a
        reported failure is final, unless `retry` says otherwise.

        `rate` ("10/min") limits how often the server hands the node out. `concurrency` limits how many attempts run at
        the same time. Both count over all executions of the workflow, all its versions with limits, and all workers.
        """
        if reconcile and not once:
            raise InvalidRequest(f"node {node_id!r} has reconcile without once: give both, or none")
        return self._add(
            node_id,
            NodeType.EFFECT,
            depends_on,
            output,
            timeout_seconds=timeout_seconds,
            retry=default_retry(once) if retry is None else retry,
            once=once,
            reconcile=reconcile,
            rate=_rate(rate),
            concurrency=concurrency,
        )

    def compute(
        self,
        node_id: str,
        output: type[BaseModel] | None = None,
        *,
        depends_on: Sequence[str] | None = None,
        timeout_seconds: float | None = None,
        retry: RetryPolicy = DEFAULT_RETRY_POLICY,
        rate: Rate | str | None = None,
        concurrency: int | None = None,
    ) -> WorkflowBuilder:
        """Add a node that only computes. The parameters mean the same as those of `effect`."""
        return self._add(
            node_id,
            NodeType.COMPUTE,
            depends_on,
            output,
            timeout_seconds=timeout_seconds,
            retry=retry,
            rate=_rate(rate),
            concurrency=concurrency,
        )

    def router(
        self, node_id: str, routes: Mapping[str, str], *, depends_on: Sequence[str] | None = None
    ) -> WorkflowBuilder:
        """Add a node whose handler returns the name of the target to run. The other targets are skipped.

        `routes` maps each target to its condition. The condition is for readers: the handler decides.
        """
        pairs = tuple(Route(condition=condition, target=target) for target, condition in routes.items())
        return self._add(node_id, NodeType.ROUTER, depends_on, routes=pairs)

    def map(
        self,
        node_id: str,
        output: type[BaseModel] | None = None,
        *,
        depends_on: Sequence[str] | None = None,
        timeout_seconds: float | None = None,
        retry: RetryPolicy = DEFAULT_RETRY_POLICY,
    ) -> WorkflowBuilder:
        """Add a node that runs a task for each item of a list. Its output is the list of the tasks' results.

        `output` is the model of one result. `timeout_seconds` and `retry` apply to each task.
        """
        return self._add(node_id, NodeType.MAP, depends_on, output, timeout_seconds=timeout_seconds, retry=retry)

    def reduce(
        self,
        node_id: str,
        output: type[BaseModel] | None = None,
        *,
        map_node_id: str = "",
        timeout_seconds: float | None = None,
        retry: RetryPolicy = DEFAULT_RETRY_POLICY,
    ) -> WorkflowBuilder:
        """Add a node that computes from the results of a MAP node: by default, of the MAP node that was added last."""
        maps = [node.node_id for node in self._nodes if node.node_type is NodeType.MAP]
        if not map_node_id and not maps:
            raise InvalidRequest(f"node {node_id!r} reduces nothing: add a MAP node before it")
        mapped = map_node_id or maps[-1]
        return self._add(
            node_id, NodeType.REDUCE, [mapped], output, map_node_id=mapped, timeout_seconds=timeout_seconds, retry=retry
        )

    def subworkflow(
        self,
        node_id: str,
        sub_workflow_id: str,
        output: type[BaseModel] | None = None,
        *,
        depends_on: Sequence[str] | None = None,
    ) -> WorkflowBuilder:
        """Add a node that starts an execution of another workflow. Its handler returns that execution's input.

        The node's output is the output of the node that completed last in that execution.
        """
        return self._add(node_id, NodeType.SUBWORKFLOW, depends_on, output, sub_workflow_id=sub_workflow_id)

    def timer(self, node_id: str, delay_seconds: float, *, depends_on: Sequence[str] | None = None) -> WorkflowBuilder:
        """Add a node that completes after a delay. The server waits, and no worker is needed."""
        return self._add(node_id, NodeType.TIMER, depends_on, delay_seconds=delay_seconds)

    def human_approval(
        self, node_id: str, *, depends_on: Sequence[str] | None = None, timeout_seconds: float | None = None
    ) -> WorkflowBuilder:
        """Add a node that a person approves or rejects. It has no handler.

        If nobody decides within `timeout_seconds`, the node and its execution fail.
        """
        return self._add(node_id, NodeType.HUMAN_APPROVAL, depends_on, timeout_seconds=timeout_seconds)

    def event(
        self,
        node_id: str,
        name: str,
        output: type[BaseModel] | None = None,
        *,
        depends_on: Sequence[str] | None = None,
        timeout_seconds: float | None = None,
        on_timeout: str = "",
    ) -> WorkflowBuilder:
        """Add a node that waits for the event `name`. Its output is the event's payload.

        If no event comes within `timeout_seconds`, the node and its execution fail. If `on_timeout` names a node, the
        execution continues with that node instead. If the event comes in time, the node `on_timeout` is skipped.
        """
        return self._add(
            node_id,
            NodeType.EVENT,
            depends_on,
            output,
            event=name,
            timeout_seconds=timeout_seconds,
            on_timeout=on_timeout,
        )

    def _add(
        self,
        node_id: str,
        node_type: NodeType,
        depends_on: Sequence[str] | None,
        output: type[BaseModel] | None = None,
        **fields: Any,
    ) -> WorkflowBuilder:
        if isinstance(depends_on, str):
            raise InvalidRequest(f"node {node_id!r}: depends_on must be a list: [{depends_on!r}]")
        for name, kind in (("retry", RetryPolicy), ("rate", Rate)):
            value = fields.get(name)
            if value is not None and not isinstance(value, kind):
                raise InvalidRequest(f"node {node_id!r}: {name} must be a {kind.__name__}, not {value!r}")
        _check_model(output, f"node {node_id!r}: output")
        dependencies = tuple(node.node_id for node in self._nodes) if depends_on is None else tuple(depends_on)
        self._nodes.append(NodeDefinition(node_id, node_type, dependencies, output, **fields))
        return self

    def build(self) -> Workflow:
        """Return the workflow. Raises InvalidRequest for a duplicate name, unknown dependency, cycle, or no nodes."""
        names = [node.node_id for node in self._nodes]
        if len(set(names)) != len(names):
            raise InvalidRequest(f"workflow {self._workflow_id!r} has two nodes with the same name: {names}")
        ir = {"nodes": {node.node_id: node.ir() for node in self._nodes}}
        try:
            ir_json = json.dumps(ir, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        except ValueError as error:
            raise InvalidRequest(
                f"workflow {self._workflow_id!r} has a delay or time limit that is not a finite number"
            ) from error
        parse_ir(ir_json)
        # Hash the workflow's id, too. Workers poll by hash, and two workflows with equal nodes must not share tasks.
        digest = hashlib.sha256(f"{self._workflow_id}\n{ir_json}".encode()).hexdigest()
        return Workflow(self._workflow_id, f"sha256:{digest}", ir_json, tuple(self._nodes), self._input)


def _rate(rate: Rate | str | None) -> Rate | None:
    return Rate.parse(rate) if isinstance(rate, str) else rate


def workflow(workflow_id: str, *, input: type[BaseModel] | None = None) -> WorkflowBuilder:
    """Return a builder for a workflow definition."""
    check_id(workflow_id, "workflow_id")
    _check_model(input, f"workflow {workflow_id!r}: input")
    return WorkflowBuilder(workflow_id, input)


def _check_model(model: object, what: str) -> None:
    """Raise InvalidRequest unless `model` is None or a Pydantic model's class."""
    if model is not None and not (isinstance(model, type) and issubclass(model, BaseModel)):
        raise InvalidRequest(f"{what} must be a Pydantic model's class, not {model!r}")


def check_id(value: str, what: str) -> str:
    """Return `value` if it is a valid id: printable, not empty, not too long. Raises InvalidRequest."""
    if not value:
        raise InvalidRequest(f"{what} is empty")
    if len(value) > MAX_ID_LENGTH:
        raise InvalidRequest(f"{what} has {len(value):,} characters; the limit is {MAX_ID_LENGTH}")
    if not value.isprintable():
        raise InvalidRequest(f"{what} {value!r} has unprintable characters")
    return value


def check_attributes(attributes: Mapping[str, str]) -> None:
    """Raise InvalidRequest unless these are valid attributes: few, with short names and printable values."""
    if len(attributes) > MAX_ATTRIBUTES:
        raise InvalidRequest(f"there are {len(attributes):,} attributes; the limit is {MAX_ATTRIBUTES}")
    for name, value in attributes.items():
        if len(check_id(name, "an attribute's name")) > MAX_ATTRIBUTE_NAME or "=" in name:
            raise InvalidRequest(
                f"{name!r} can't be the name of an attribute: use up to {MAX_ATTRIBUTE_NAME} characters, and no ="
            )
        if value:
            check_id(value, f"the value of attribute {name!r}")


class _NodeIr(BaseModel):
    # Ignore unknown fields: the SDKs of published Nexum servers may add fields.
    model_config = ConfigDict(extra="ignore")

    type: str
    dependencies: list[str] = []
    routes: list[Route] = []
    map_node_id: str = Field(default="", alias="mapNodeId")
    sub_workflow_id: str = Field(default="", alias="subWorkflowId")
    delay_seconds: Number = Field(default=0, ge=0, le=MAX_SECONDS)
    event: str = ""
    on_timeout: str = ""
    timeout_seconds: Number | None = Field(default=None, gt=0, le=MAX_SECONDS)
    retry_policy: RetryPolicy | None = None
    effect: Literal["idempotent", "once"] = "idempotent"
    reconcile: bool = Field(default=False, strict=True)
    rate: Rate | None = None
    concurrency: Concurrency | None = None


class _WorkflowIr(BaseModel):
    model_config = ConfigDict(extra="ignore")

    nodes: dict[str, _NodeIr]


def parse_ir(ir_json: str) -> dict[str, NodeDefinition]:
    """Return the nodes of an IR, dependencies first. Raises InvalidRequest if the IR or one of its nodes can't run."""
    document = jsontext.parse(ir_json, "ir_json", max_bytes=MAX_IR_BYTES)
    try:
        ir = _WorkflowIr.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the document"
        raise InvalidRequest(f"ir_json does not describe a workflow: {place}: {first['msg']}") from error
    if not ir.nodes:
        raise InvalidRequest("ir_json has no nodes: a workflow needs at least one")
    if len(ir.nodes) > MAX_NODES:
        raise InvalidRequest(f"ir_json has {len(ir.nodes):,} nodes; the limit is {MAX_NODES:,}")
    if (count := sum(len(node.dependencies) + len(node.routes) for node in ir.nodes.values())) > MAX_DEPENDENCIES:
        raise InvalidRequest(
            f"the nodes of ir_json have {count:,} dependencies and routes; the limit is {MAX_DEPENDENCIES:,}"
        )
    definitions = {node_id: _definition(node_id, node, ir.nodes) for node_id, node in ir.nodes.items()}
    # A target waits for the nodes that may choose it, even if it doesn't depend on them.
    # Use lists, not sets: the order of the nodes must be the same in every process.
    before = {node_id: [*node.dependencies] for node_id, node in definitions.items()}
    for node in definitions.values():
        for target in node.targets:
            before[target].append(node.node_id)
    try:
        return {node_id: definitions[node_id] for node_id in TopologicalSorter(before).static_order()}
    except CycleError as error:
        raise InvalidRequest(f"ir_json has a cycle: {' -> '.join(error.args[1])}") from error


def _definition(node_id: str, node: _NodeIr, nodes: Mapping[str, _NodeIr]) -> NodeDefinition:
    check_id(node_id, "a node's name")
    if node.type not in _KNOWN_TYPES:
        raise InvalidRequest(
            f"node {node_id!r} is of type {node.type!r}, which this server does not run: use "
            f"{', '.join(_KNOWN_TYPES[:-1])} or {_KNOWN_TYPES[-1]}"
        )
    node_type = NodeType(node.type)
    for dependency in node.dependencies:
        if dependency not in nodes:
            raise InvalidRequest(f"node {node_id!r} depends on {dependency!r}, which is not a node of the workflow")
    is_router, is_event = node_type is NodeType.ROUTER, node_type is NodeType.EVENT
    if is_router and not node.routes:
        raise InvalidRequest(f"ROUTER node {node_id!r} has no routes: give it routes, each with a target")
    mapped = node.map_node_id if node_type is NodeType.REDUCE else ""
    if mapped and (mapped not in nodes or nodes[mapped].type != NodeType.MAP):
        raise InvalidRequest(f"REDUCE node {node_id!r} reduces {mapped!r}, which is not a MAP node of the workflow")
    if is_event:
        check_id(node.event, f"the event of node {node_id!r}")
        if node.on_timeout and node.timeout_seconds is None:
            raise InvalidRequest(f"EVENT node {node_id!r} has on_timeout, but no timeout_seconds")
    may_time_out = node_type is not NodeType.TIMER
    once = node_type is NodeType.EFFECT and node.effect == "once"
    may_be_limited = node_type in (NodeType.EFFECT, NodeType.COMPUTE)
    definition = NodeDefinition(
        node_id,
        node_type,
        tuple(sorted({*node.dependencies, mapped} - {""})),  # the order has no meaning
        routes=tuple(node.routes) if is_router else (),
        map_node_id=mapped,
        sub_workflow_id=node.sub_workflow_id if node_type is NodeType.SUBWORKFLOW else "",
        delay_seconds=node.delay_seconds if node_type is NodeType.TIMER else 0,
        event=node.event if is_event else "",
        on_timeout=node.on_timeout if is_event else "",
        timeout_seconds=node.timeout_seconds if may_time_out else None,
        retry=node.retry_policy or default_retry(once),
        once=once,
        reconcile=once and node.reconcile,
        rate=node.rate if may_be_limited else None,
        concurrency=node.concurrency if may_be_limited else None,
    )
    for target in definition.targets:
        if target not in nodes:
            raise InvalidRequest(f"node {node_id!r} routes to {target!r}, which is not a node of the workflow")
    return definition


def compatibility(old: Mapping[str, NodeDefinition], new: Mapping[str, NodeDefinition]) -> Compatibility:
    """Return how `new` relates to the version registered before it.

    Like a published server, compare only the nodes' types and dependencies.
    """
    for node_id, before in old.items():
        after = new.get(node_id)
        if after is None or after.node_type != before.node_type or after.dependencies != before.dependencies:
            return Compatibility.BREAKING
    return Compatibility.SAFE if len(new) > len(old) else Compatibility.IDENTICAL
