"""The contract: the wire code is generated from proto/nexum.proto, which contains the whole published contract."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from harness import ROOT
from published_protocol import FIRST_ADDED_NUMBER, PUBLISHED_MESSAGES, PUBLISHED_RPCS, REPEATED

from nexum_engine.wire import nexum_pb2
from nexum_engine.wire.generate import GENERATED, HERE, generate


@pytest.mark.parametrize("message", PUBLISHED_MESSAGES)
def test_published_fields_are_kept_and_additions_start_at_100(message: str) -> None:
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
        assert len(getattr(getattr(nexum_pb2, message)(), field.name)) == 0  # only a list has a length


def test_published_rpcs_keep_their_names() -> None:
    assert nexum_pb2.DESCRIPTOR.package == "nexum"
    service = nexum_pb2.DESCRIPTOR.services_by_name["NexumService"]
    ours = {method.name: (method.input_type.name, method.output_type.name) for method in service.methods}
    assert {name: ours.get(name) for name in PUBLISHED_RPCS} == PUBLISHED_RPCS
    added = {"GetExecution", "WorkerStream", "GetServerInfo", "Calls", "GetOutput", "RetryExecution", "SendEvent"}
    assert set(ours) - set(PUBLISHED_RPCS) == added | {"Prune", "Backup", "GetUnknown", "ResolveNode", "GetTools"}


def test_generated_code_matches_the_contract(tmp_path: Path) -> None:
    # Skip only if the generator is not installed: a generator that fails to load must fail the test.
    if find_spec("grpc_tools") is None:
        pytest.skip("the generator (grpcio-tools 1.71) is not installed: it has no wheels for Python 3.14 and later")
    generate(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(GENERATED)
    stale = [name for name in GENERATED if (tmp_path / name).read_bytes() != (HERE / name).read_bytes()]
    assert stale == [], "run: python -m nexum_engine.wire.generate"


def test_proto_folder_has_no_python() -> None:
    assert [path.name for path in (ROOT / "proto").iterdir() if path.name != "__pycache__"] == ["nexum.proto"]
