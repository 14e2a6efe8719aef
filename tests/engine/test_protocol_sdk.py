"""The published SDK, nexum-py 0.2.0: its client and worker use this server.

The SDK needs protobuf 6, so it can't be installed beside AutoGen. The tests build a venv for it in pytest's cache.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock
from harness import MACHINES_CERTIFICATES, environment, trusting
from nexum_wire import connected, record
from run import interpreter_of, new_environment
from server_thread import ServerThread

pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="nexum-py 0.2.0 needs Python 3.11")

SDK = "nexum-py==0.2.0"

PROGRAM = '''
"""The SDK's own example, with each node type that it knows: a client, and a worker that runs to the end."""
import asyncio, json, sys
from pydantic import BaseModel
from nexum.builder import workflow
from nexum.client import NexumClient
from nexum.worker import Worker

class Text(BaseModel):
    text: str

async def first(ctx):
    return Text(text=f"about {ctx.input['topic']}")

def then(name, *before):
    async def step(ctx):
        return Text(text=f"{name}({', '.join(ctx.get(one).text for one in before)})")
    return step

ONE = workflow("sdk-one").effect("research", Text, first).build()
FOUR = (
    workflow("sdk-four")
    .effect("research", Text, first)
    .compute("validate", Text, then("validate", "research"))
    .effect("summarize", Text, then("summarize", "validate"))
    .effect("report", Text, then("report", "research", "summarize"))
    .build()
)
TIMED = (
    workflow("sdk-timed")
    .effect("research", Text, first)
    .timer("pause", 1)
    .effect("report", Text, then("report", "research"))
    .build()
)
host, port = sys.argv[1].split(":")
client = NexumClient(host=host, port=int(port))
said = {}
for built in (ONE, FOUR, TIMED):
    compatibility = [client.register_workflow(built) for _ in range(2)]
    execution_id = client.start_execution(built.workflow_id, {"topic": "Tokyo"}, built.version_hash)
    outputs = asyncio.run(Worker([built], host=host, port=int(port)).run_until_complete(execution_id, timeout=30))
    said[built.workflow_id] = [execution_id, compatibility, outputs, client.get_status(execution_id)["status"]]
print(json.dumps(said))
'''

REFUSED = """
import json, sys
import grpc
from nexum.client import NexumClient
host, port = sys.argv[1].split(":")
client = NexumClient(host=host, port=int(port))
said = []
for call in (lambda: client.start_execution("nowhere", {}, "v"), lambda: client.get_status("exec-x"),
             lambda: client.complete_task("task-x", {})):
    try:
        call()
    except grpc.RpcError as error:
        said.append([error.code().name, error.details()])
print(json.dumps(said))
"""


@pytest.fixture(scope="session")
def sdk_python(pytestconfig: pytest.Config) -> Path:
    """Return the Python of a venv with the published SDK. The first run needs the package index."""
    cache = pytestconfig.cache
    assert cache is not None
    folder = cache.mkdir(f"nexum-sdk-{sys.version_info.major}.{sys.version_info.minor}")
    with FileLock(folder / "lock"):
        if not (folder / "complete").exists():
            with trusting(MACHINES_CERTIFICATES):
                try:
                    new_environment(sys.executable, folder / "venv", [SDK])
                except SystemExit:
                    pytest.skip(f"the package index did not give {SDK}")
            (folder / "complete").touch()
    return interpreter_of(folder / "venv")


def run(python: Path, program: str, server: ServerThread, folder: Path) -> object:
    """Run the program; return its output, read as JSON."""
    env = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    command = [str(python), "-c", program, server.address]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


@pytest.mark.timeout(700)
def test_published_client_and_worker_run_their_workflows(
    sdk_python: Path, server: ServerThread, tmp_path: Path
) -> None:
    said = run(sdk_python, PROGRAM, server, tmp_path)
    assert isinstance(said, dict)
    one_id, one_compatibility, one_outputs, one_status = said["sdk-one"]
    four_id, four_compatibility, four_outputs, four_status = said["sdk-four"]
    timed_id, _, timed_outputs, timed_status = said["sdk-timed"]
    assert (timed_status, timed_outputs["pause"]["delay_seconds"]) == ("COMPLETED", 1)
    assert timed_outputs["report"] == {"text": "report(about Tokyo)"}
    assert [one_compatibility, four_compatibility] == [["NEW", "IDENTICAL"]] * 2
    assert [one_status, four_status] == ["COMPLETED", "COMPLETED"]
    assert one_outputs == {"research": {"text": "about Tokyo"}}
    assert four_outputs == {
        "research": {"text": "about Tokyo"},
        "validate": {"text": "validate(about Tokyo)"},
        "summarize": {"text": "summarize(validate(about Tokyo))"},
        "report": {"text": "report(about Tokyo, summarize(validate(about Tokyo)))"},
    }
    with connected(server.address) as stub:
        timed = record(stub, timed_id)
        assert timed.ended_ms - timed.created_ms >= 1000
        assert [node.node_type for node in timed.nodes] == ["EFFECT", "TIMER", "EFFECT"]
        for execution_id in (one_id, four_id):
            for node in record(stub, execution_id).nodes:
                assert [(a.attempt, a.outcome) for a in node.attempts] == [(1, "COMPLETED")]
                assert node.attempts[0].worker_id.startswith("py-worker-")


@pytest.mark.timeout(700)
def test_published_client_gets_clear_errors(sdk_python: Path, server: ServerThread, tmp_path: Path) -> None:
    assert run(sdk_python, REFUSED, server, tmp_path) == [
        ["NOT_FOUND", "version 'v' of workflow 'nowhere' is not registered: call RegisterWorkflow first"],
        ["NOT_FOUND", "no execution 'exec-x' in this server's database"],
        ["NOT_FOUND", "this server handed out no task 'task-x'"],
    ]
