"""The contract: our code is generated from proto/nexum.proto, and the published contract is all in it."""

from __future__ import annotations

from pathlib import Path

import pytest
from google.protobuf.descriptor import FieldDescriptor
from harness import ROOT

from nexum_engine.wire import nexum_pb2
from nexum_engine.wire.generate import GENERATED, HERE, generate

FIRST_ADDED_NUMBER = 100
STRING, BOOL, INT32, MESSAGE = (
    *(FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BOOL),
    *(FieldDescriptor.TYPE_INT32, FieldDescriptor.TYPE_MESSAGE),
)


def strings(*names: str) -> dict[str, tuple[int, int]]:
    return {name: (number, STRING) for number, name in enumerate(names, start=1)}


# nexum-py 0.2.0, read from its descriptor: field name, number, type.
PUBLISHED_MESSAGES: dict[str, dict[str, tuple[int, int]]] = {
    "WorkflowIR": strings("workflow_id", "version_hash", "ir_json"),
    "AckResponse": {"ok": (1, BOOL), "compatibility": (2, STRING), "message": (3, STRING)},
    "StartRequest": strings("workflow_id", "version_hash", "input_json"),
    "StartResponse": strings("execution_id"),
    "PollRequest": strings("worker_id", "version_hash"),
    "PollResponse": {
        "has_task": (1, BOOL),
        "task_id": (2, STRING),
        "execution_id": (3, STRING),
        "node_id": (4, STRING),
        "input_json": (5, STRING),
        "idempotency_key": (6, STRING),
        "node_type": (7, STRING),
        "map_item_json": (10, STRING),
        "is_map_subtask": (11, BOOL),
        "map_index": (12, INT32),
        "map_total": (13, INT32),
        "sub_execution_id": (14, STRING),
        "sub_workflow_id": (15, STRING),
        "sub_input_json": (16, STRING),
    },
    "CompleteRequest": strings("task_id", "output_json"),
    "FailRequest": strings("task_id", "error_message"),
    "StatusRequest": strings("execution_id"),
    "StatusResponse": strings("status", "completed_nodes_json"),
    "ListRequest": {"workflow_id": (1, STRING), "status": (2, STRING), "limit": (3, INT32)},
    "ExecutionSummary": strings("execution_id", "workflow_id", "version_hash", "status", "created_at"),
    "ListResponse": {"executions": (1, MESSAGE)},
    "CancelRequest": strings("execution_id"),
    "ListVersionsRequest": strings("workflow_id"),
    "VersionInfo": {
        **strings("workflow_id", "version_hash", "compatibility", "registered_at"),
        "active_executions": (5, INT32),
    },
    "ListVersionsResponse": {"versions": (1, MESSAGE)},
    "ApproveRequest": strings("execution_id", "node_id", "approver", "comment"),
    "RejectRequest": strings("execution_id", "node_id", "approver", "reason"),
    "EmptyRequest": {},
    "PendingApprovalItem": strings("execution_id", "node_id", "workflow_id", "started_at"),
    "PendingApprovalsResponse": {"items": (1, MESSAGE)},
}
REPEATED = {
    "ListResponse": "ExecutionSummary",
    "ListVersionsResponse": "VersionInfo",
    "PendingApprovalsResponse": "PendingApprovalItem",
}
PUBLISHED_RPCS = {
    "RegisterWorkflow": ("WorkflowIR", "AckResponse"),
    "StartExecution": ("StartRequest", "StartResponse"),
    "PollTask": ("PollRequest", "PollResponse"),
    "CompleteTask": ("CompleteRequest", "AckResponse"),
    "FailTask": ("FailRequest", "AckResponse"),
    "GetStatus": ("StatusRequest", "StatusResponse"),
    "ListExecutions": ("ListRequest", "ListResponse"),
    "CancelExecution": ("CancelRequest", "AckResponse"),
    "ListWorkflowVersions": ("ListVersionsRequest", "ListVersionsResponse"),
    "ApproveTask": ("ApproveRequest", "AckResponse"),
    "RejectTask": ("RejectRequest", "AckResponse"),
    "GetPendingApprovals": ("EmptyRequest", "PendingApprovalsResponse"),
}


@pytest.mark.parametrize("message", PUBLISHED_MESSAGES)
def test_a_published_message_has_its_fields_and_what_is_added_is_numbered_from_100(message: str) -> None:
    ours = nexum_pb2.DESCRIPTOR.message_types_by_name[message]
    fields = {field.name: (field.number, field.type) for field in ours.fields}
    published = PUBLISHED_MESSAGES[message]
    assert {name: fields.get(name) for name in published} == published
    added = {name: number for name, (number, _) in fields.items() if name not in published}
    assert [name for name, number in added.items() if number < FIRST_ADDED_NUMBER] == []
    if message in REPEATED:
        (field,) = ours.fields
        assert field.message_type is not None
        assert field.message_type.name == REPEATED[message]
        assert len(getattr(getattr(nexum_pb2, message)(), field.name)) == 0  # a list


def test_the_published_rpcs_are_there_under_their_names() -> None:
    assert nexum_pb2.DESCRIPTOR.package == "nexum"
    service = nexum_pb2.DESCRIPTOR.services_by_name["NexumService"]
    ours = {method.name: (method.input_type.name, method.output_type.name) for method in service.methods}
    assert {name: ours.get(name) for name in PUBLISHED_RPCS} == PUBLISHED_RPCS
    assert set(ours) - set(PUBLISHED_RPCS) == {"GetExecution", "WorkerStream"}


def test_the_generated_code_is_what_the_contract_generates_today(tmp_path: Path) -> None:
    generate(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(GENERATED)
    stale = [name for name in GENERATED if (tmp_path / name).read_bytes() != (HERE / name).read_bytes()]
    assert stale == [], "run: python -m nexum_engine.wire.generate"


def test_the_folder_of_the_contract_holds_no_python() -> None:
    assert [path.name for path in (ROOT / "proto").iterdir() if path.name != "__pycache__"] == ["nexum.proto"]
