"""The published protocol, read from the descriptor of nexum-py 0.2.0."""

from __future__ import annotations

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

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


def published(message: Message) -> Message:
    """Return the message without this project's additions. Do the same for the messages in its lists."""
    for field, value in message.ListFields():
        if field.number >= FIRST_ADDED_NUMBER:
            message.ClearField(field.name)
        elif field.message_type is not None:
            for one in value:
                published(one)
    message.DiscardUnknownFields()
    return message
