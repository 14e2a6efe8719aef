"""Workflows as data: the builder, the intermediate representation (IR) that the server gets, and the version hash.

    PIPELINE = (
        workflow("research-pipeline")
        .effect("research", Claims)
        .effect("report", Report)
        .build()
    )

The IR has the published server's format: `{"nodes": {id: {"type": "EFFECT", "dependencies": [id, ...]}}}`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter

from pydantic import BaseModel, ConfigDict, ValidationError

from nexum_engine import jsontext
from nexum_engine.errors import InvalidRequest
from nexum_engine.records import Compatibility, NodeType

MAX_IR_BYTES = 1024 * 1024
MAX_NODES = 1000
MAX_DEPENDENCIES = 10_000  # of all nodes together
MAX_ID_LENGTH = 200  # characters
MAX_ATTRIBUTES = 10  # of one execution
MAX_ATTRIBUTE_NAME = 64  # characters


@dataclass(frozen=True)
class NodeDefinition:
    """A node of a workflow. The worker checks the handler's result with `output`. The server never sees this model."""

    node_id: str
    node_type: NodeType
    dependencies: tuple[str, ...]
    output: type[BaseModel] | None = None


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
        self, node_id: str, output: type[BaseModel] | None = None, *, depends_on: Sequence[str] | None = None
    ) -> WorkflowBuilder:
        """Add a node that acts on the outside world. Without `depends_on` it depends on every node added before it."""
        return self._add(node_id, NodeType.EFFECT, output, depends_on)

    def compute(
        self, node_id: str, output: type[BaseModel] | None = None, *, depends_on: Sequence[str] | None = None
    ) -> WorkflowBuilder:
        """Add a node that only computes. Without `depends_on` it depends on every node added before it."""
        return self._add(node_id, NodeType.COMPUTE, output, depends_on)

    def _add(
        self, node_id: str, node_type: NodeType, output: type[BaseModel] | None, depends_on: Sequence[str] | None
    ) -> WorkflowBuilder:
        dependencies = tuple(node.node_id for node in self._nodes) if depends_on is None else tuple(depends_on)
        self._nodes.append(NodeDefinition(node_id, node_type, dependencies, output))
        return self

    def build(self) -> Workflow:
        """Return the workflow. Raises InvalidRequest for a duplicate name, unknown dependency, cycle, or no nodes."""
        names = [node.node_id for node in self._nodes]
        if len(set(names)) != len(names):
            raise InvalidRequest(f"workflow {self._workflow_id!r} has two nodes with the same name: {names}")
        ir = {
            "nodes": {
                node.node_id: {"type": node.node_type.value, "dependencies": list(node.dependencies)}
                for node in self._nodes
            }
        }
        ir_json = json.dumps(ir, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        parse_ir(ir_json)
        # Hash the workflow's id, too. Workers poll by hash, and two workflows with equal nodes must not share tasks.
        digest = hashlib.sha256(f"{self._workflow_id}\n{ir_json}".encode()).hexdigest()
        return Workflow(self._workflow_id, f"sha256:{digest}", ir_json, tuple(self._nodes), self._input)


def workflow(workflow_id: str, *, input: type[BaseModel] | None = None) -> WorkflowBuilder:
    """Return a builder for a workflow definition."""
    check_id(workflow_id, "workflow_id")
    return WorkflowBuilder(workflow_id, input)


def check_id(value: str, what: str) -> str:
    """Return `value` if it is a valid id: printable, not empty, not too long. Otherwise raise InvalidRequest."""
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
    # Ignore unknown fields: the published builders may add fields for node types that this server doesn't run.
    model_config = ConfigDict(extra="ignore")

    type: str
    dependencies: list[str] = []


class _WorkflowIr(BaseModel):
    model_config = ConfigDict(extra="ignore")

    nodes: dict[str, _NodeIr]


def parse_ir(ir_json: str) -> dict[str, NodeDefinition]:
    """Return the nodes of an IR, dependencies first. Raises InvalidRequest, with the node's name, if one can't run."""
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
    if (count := sum(len(node.dependencies) for node in ir.nodes.values())) > MAX_DEPENDENCIES:
        raise InvalidRequest(f"the nodes of ir_json have {count:,} dependencies; the limit is {MAX_DEPENDENCIES:,}")
    known_types = {node_type.value for node_type in NodeType}
    for node_id, node in ir.nodes.items():
        check_id(node_id, "a node's name")
        if node.type not in known_types:
            raise InvalidRequest(
                f"node {node_id!r} is of type {node.type!r}, which this server does not run: use "
                f"{' or '.join(sorted(known_types, reverse=True))}"
            )
        for dependency in node.dependencies:
            if dependency not in ir.nodes:
                raise InvalidRequest(f"node {node_id!r} depends on {dependency!r}, which is not a node of the workflow")
    try:
        order = TopologicalSorter({node_id: node.dependencies for node_id, node in ir.nodes.items()}).static_order()
        return {
            node_id: NodeDefinition(
                node_id,
                NodeType(ir.nodes[node_id].type),
                tuple(sorted(set(ir.nodes[node_id].dependencies))),  # the order has no meaning
            )
            for node_id in order
        }
    except CycleError as error:
        raise InvalidRequest(f"ir_json has a cycle: {' -> '.join(error.args[1])}") from error


def compatibility(old: Mapping[str, NodeDefinition], new: Mapping[str, NodeDefinition]) -> Compatibility:
    """Return how `new` relates to the version registered before it."""
    for node_id, before in old.items():
        after = new.get(node_id)
        if after is None or after.node_type != before.node_type or after.dependencies != before.dependencies:
            return Compatibility.BREAKING
    return Compatibility.SAFE if len(new) > len(old) else Compatibility.IDENTICAL
