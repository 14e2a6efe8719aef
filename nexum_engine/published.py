"""Convert the answers of a published Nexum server to this package's records.

A published Nexum server is one that isn't this project's. It stores no attempts, no reasons of failures, and no times
except the start.
"""

from __future__ import annotations

import json
import logging
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from nexum_engine.errors import ServerError
from nexum_engine.records import Execution, ExecutionStatus, Node, NodeStatus
from nexum_engine.wire import nexum_pb2 as pb

logger = logging.getLogger(__name__)
"""The client logs its warning about a published server here. A program with its own warning can turn the logger off."""
_OUTPUTS = TypeAdapter(dict[str, Any])


class _Pointer(BaseModel):
    """The pointer to a file of the server, which a published server returns in place of an output above 100 kB."""

    model_config = ConfigDict(strict=True)

    is_claim_check: Literal[True] = Field(alias="__nexum_claim_check__")
    blob_id: str
    size: int


def execution(execution_id: str, answer: pb.StatusResponse) -> Execution:
    """Return the execution that a GetStatus answer describes. Raises ServerError if an output can't be read."""
    try:
        outputs = _OUTPUTS.validate_json(answer.completed_nodes_json or "{}")
    except ValidationError as error:
        raise ServerError(f"the server's outputs of execution {execution_id} are not a JSON object: {error}") from error
    status = ExecutionStatus(answer.status)
    return Execution(
        execution_id=execution_id,
        workflow_id="",
        version_hash="",
        status=status,
        input_json="",
        idempotency_key="",
        created_ms=0,
        ended_ms=None,
        error="the server keeps no reason: see the worker's output" if status is ExecutionStatus.FAILED else "",
        nodes=tuple(
            Node(
                node_id,
                "",
                NodeStatus.COMPLETED,
                _followed(execution_id, node_id, output) or json.dumps(output, ensure_ascii=False),
                "",
            )
            for node_id, output in sorted(outputs.items())  # the server sends them in random order
        ),
    )


def _followed(execution_id: str, node_id: str, output: Any) -> str | None:
    """Return the text of the file to which `output` points; None if `output` isn't a pointer."""
    try:
        pointer = _Pointer.model_validate(output)
    except ValidationError:
        return None
    name = f"{execution_id}-{node_id}"
    if pointer.blob_id != name:
        return None  # a tool's output that looks like a pointer must not choose which file is read
    path = Path(".nexum", "blobs", f"{name}.json")
    try:
        text = path.read_text(encoding="utf-8")
        if len(text.encode("utf-8")) == pointer.size:
            json.loads(text)
            return text
    except (OSError, ValueError):
        pass
    raise ServerError(
        f"the output of node {node_id!r} of execution {execution_id} ({pointer.size:,} bytes) is in a file of the "
        f"server, {path.as_posix()} in the folder where it was started: run this program in that folder, or use this "
        "project's own server (python -m nexum_engine)"
    )


def milliseconds(created_at: str) -> int:
    """Convert a published server's time, such as 2026-01-31 12:00:00 (UTC), to Unix milliseconds; 0 if invalid."""
    try:
        return round(datetime.fromisoformat(created_at).replace(tzinfo=timezone.utc).timestamp() * 1000)
    except ValueError:
        return 0
