"""Helpers for the tests of the pipeline: its scripts as processes, and its records."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autogen_core.models import ChatCompletionClient, CreateResult, LLMMessage
from harness import ROOT
from processes import is_alive, recorded, run_script

from nexum_engine.client import NexumClient
from nexum_engine.records import Attempt, Execution, ExecutionStatus, Node, NodeStatus, Outcome
from nexum_engine.worker import TaskContext
from pipeline_workflow import OFFLINE_PIPELINE, STEPS, PipelineInput
from support.offline.model import OfflineModel
from support.pipeline.effects import Effect
from support.pipeline.evidence import CrashPoint, PipelineRun, SeenWorker

CRASH_DEMO = str(ROOT / "crash_demo.py")
PIPELINE_WORKER = str(ROOT / "pipeline_worker.py")
QUERY = "Impact of Rust on systems programming"
RUST_PAGE = "https://offline.example/rust-in-systems-programming"
RUST_QUOTE = "The Rust Foundation has looked after the language since 2021."


# ---- Processes -------------------------------------------------------------------------------------------------------


def run_crash_demo(folder: Path, *arguments: str, env: Mapping[str, str] | None = None) -> tuple[int, str]:
    return run_script([CRASH_DEMO, *arguments], folder, env, forked=True)


def pipelines(folder: Path, address: str | None = None) -> list[dict[str, Any]]:
    """Return the recorded offline pipelines, with nodes and attempts, oldest first. Include the drills' pipelines.

    Read them from the server at `address`. Without an address, read them from the demo's database.
    """
    return recorded(folder, address, lambda id_: id_.startswith(OFFLINE_PIPELINE.workflow_id))


def attempts(execution: Mapping[str, Any]) -> list[tuple[str, int, str, str]]:
    """Return step, number, worker's name and outcome of each attempt, in the order of the attempts' starts."""
    rows = [
        (attempt["started_ms"], STEPS.index(node["node_id"]), node["node_id"], attempt)
        for node in execution["nodes"]
        for attempt in node["attempts"]
    ]
    return [
        (step, attempt["attempt"], re.sub(r"-pid\d+$", "", attempt["worker_id"]), attempt["outcome"])
        for _, _, step, attempt in sorted(rows, key=lambda row: row[:2])
    ]


def output_of(execution: Mapping[str, Any], step: str) -> dict[str, Any]:
    text = next(node["output_json"] for node in execution["nodes"] if node["node_id"] == step)
    output: dict[str, Any] = json.loads(text)
    return output


def assert_no_worker_is_left(output: str) -> None:
    """Check that all workers have ended. The demo's output has a line with the pid of each worker that it started."""
    pids = [int(pid) for pid in re.findall(r"started \(pid (\d+)\)", output)]
    assert pids
    assert [pid for pid in pids if is_alive(pid)] == []


def start_pipeline(address: str, query: str = QUERY) -> str:
    """Start an offline pipeline outside of any drill; return its execution id."""

    async def start() -> str:
        async with NexumClient(address) as client:
            await client.register_workflow(OFFLINE_PIPELINE, patience=10)
            return (await client.start_execution(OFFLINE_PIPELINE, PipelineInput(query=query))).execution_id

    return asyncio.run(start())


def record_research(address: str, execution_id: str, claims: Sequence[Mapping[str, str]]) -> None:
    """Take the research step's task as a worker, and complete it with these claims."""

    async def record() -> None:
        async with NexumClient(address) as client:
            task = await client.poll_task("planter", [OFFLINE_PIPELINE.version_hash], wait=5)
            assert task is not None
            assert (task.execution_id, task.node_id) == (execution_id, "research")
            await client.complete_task(task.task_id, json.dumps({"claims": list(claims), "note": ""}))

    asyncio.run(record())


# ---- Steps -----------------------------------------------------------------------------------------------------------


def task(step: str, deps: Mapping[str, Any] | None = None, *, query: str = QUERY, attempt: int = 1) -> TaskContext:
    return TaskContext({"query": query}, deps or {}, "exec-1", step, attempt, f"key-{step}")


class ScriptedModel(OfflineModel):
    """A model that returns or raises `replies` in order, then repeats the last one. It keeps the received messages."""

    def __init__(self, *replies: str | Exception) -> None:
        super().__init__()
        self.replies = replies
        self.sent: list[list[LLMMessage]] = []

    async def create(self, messages: Sequence[LLMMessage], **_: Any) -> CreateResult:
        self.sent.append(list(messages))
        reply = self.replies[min(len(self.sent), len(self.replies)) - 1]
        if isinstance(reply, Exception):
            raise reply
        return CreateResult(finish_reason="stop", content=reply, usage=self.actual_usage(), cached=False)


def always(model: ChatCompletionClient) -> Callable[[str], ChatCompletionClient]:
    """Return a function that returns this model for every step."""
    return lambda step: model


# ---- Records made by hand --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Try:
    """One attempt of a made-up record; times in milliseconds since the execution's start."""

    step: str
    worker: str
    start: int
    end: int
    outcome: Outcome = Outcome.COMPLETED
    effect: bool = True


OUTPUTS: dict[str, dict[str, Any]] = {
    "research": {"claims": [], "note": "nothing"},
    "validate": {"sources": [], "kept": [], "dropped": []},
    "summarize": {"text": "It is so. [1]"},
    "report": {"markdown": "# It is so\n"},
}
BEGUN_MS = 1_700_000_000_000
ONE, TWO = SeenWorker("worker-1", 11), SeenWorker("worker-2", 22)


def recorded_outputs(*steps: str) -> dict[str, str]:
    return {step: json.dumps(OUTPUTS[step]) for step in steps}


def made_run(
    tries: Sequence[Try],
    workers: Sequence[SeenWorker],
    point: CrashPoint,
    *,
    status: ExecutionStatus = ExecutionStatus.COMPLETED,
    query: str = QUERY,
) -> PipelineRun:
    """Return a run with these attempts, as the server would record it."""
    nodes: list[Node] = []
    effects: list[Effect] = []
    for step in STEPS:
        made: list[Attempt] = []
        for one in (each for each in tries if each.step == step):
            number = len(made) + 1
            worker = next((each for each in workers if each.name == one.worker), None)
            worker_id = f"{one.worker}-pid{worker.pid if worker else 99}"
            made.append(Attempt(number, worker_id, BEGUN_MS + one.start, BEGUN_MS + one.end, one.outcome, ""))
            if one.effect:
                effects.append(
                    Effect(
                        execution_id="exec-1",
                        step=step,
                        attempt=number,
                        idempotency_key=f"key-{step}",
                        pid=worker.pid if worker else 99,
                        worker_id=worker_id,
                        begun_ms=BEGUN_MS + one.start,
                        at_ms=BEGUN_MS + one.end,
                    )
                )
        done = any(attempt.outcome is Outcome.COMPLETED for attempt in made)
        nodes.append(
            Node(
                step,
                "EFFECT",
                NodeStatus.COMPLETED if done else NodeStatus.FAILED,
                json.dumps(OUTPUTS[step]) if done else None,
                "",
                tuple(made),
            )
        )
    end = BEGUN_MS + max((one.end for one in tries), default=0)
    execution = Execution(
        "exec-1", "research-pipeline-offline", "sha256:0", status, "{}", "", BEGUN_MS, end, "", tuple(nodes)
    )
    return PipelineRun(execution, query, point, tuple(workers), tuple(effects))
