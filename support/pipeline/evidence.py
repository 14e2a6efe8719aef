"""Hold and check the evidence of one run of the pipeline.

The evidence has three sources: the server's record, the log of the steps' effects, and the demo's notes on its workers.
The notes tell how each worker ended, and which outputs were recorded at that time. Nothing in this module talks to a
server.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nexum_engine.records import Attempt, Execution, ExecutionStatus, Node, NodeStatus, Outcome
from pipeline_workflow import STEPS
from support.pipeline.effects import Effect


@dataclass(frozen=True)
class CrashPoint:
    """When worker 1 is killed: after a step is recorded or, if `within`, between the step's effect and its record."""

    step: str
    within: bool = False

    def __str__(self) -> str:
        return f"{'during' if self.within else 'after'} {self.step}"

    @property
    def in_words(self) -> str:
        """A phrase that tells when worker 1 is killed."""
        return f"within {self.step}, after its effect" if self.within else f"as soon as {self.step} is recorded"

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables that make pipeline_worker.py crash at this point."""
        return {"CRASH_AFTER": "" if self.within else self.step, "CRASH_DURING": self.step if self.within else ""}


NO_CRASH = {"CRASH_AFTER": "", "CRASH_DURING": ""}


@dataclass(frozen=True)
class SeenWorker:
    """A worker that the demo started."""

    name: str
    pid: int
    death: str = ""
    """The cause of the worker's death, or "" if the worker didn't die."""
    recorded: Mapping[str, str] | None = None
    """The outputs that the server had recorded when the worker died; None if the worker didn't die."""

    def owns(self, worker_id: str) -> bool:
        """Return whether `worker_id`, an id from the server's records, belongs to this worker."""
        # Don't compare process ids: if a launcher starts Python, the demo knows only the launcher's process id.
        return worker_id.startswith(f"{self.name}-pid")


@dataclass(frozen=True)
class Row:
    """One attempt at one step."""

    node: Node
    attempt: Attempt
    worker: SeenWorker | None
    had_effect: bool

    @property
    def outcome(self) -> str:
        """A phrase for the attempt's outcome."""
        if self.attempt.outcome is Outcome.COMPLETED:
            return "recorded"
        word: str = self.attempt.outcome.value.lower()
        if not self.is_lost:
            return word
        return f"{word}, effect done" if self.had_effect else f"{word}, no effect"

    @property
    def is_lost(self) -> bool:
        """Whether the attempt was lost: its worker died or fell silent, or the server died."""
        return self.attempt.outcome in (Outcome.LOST, Outcome.EXPIRED, Outcome.INTERRUPTED)


@dataclass(frozen=True)
class PipelineRun:
    """An execution with its crash point, its workers and its effects."""

    execution: Execution
    query: str
    point: CrashPoint
    workers: Sequence[SeenWorker]
    effects: Sequence[Effect]
    source: str = "the server's records"
    """A phrase that names the source of the attempts."""

    @property
    def rows(self) -> list[Row]:
        """Every attempt, in the order of the attempts' starts."""
        had_effect = {(effect.step, effect.attempt) for effect in self.effects}
        rows = [
            Row(node, attempt, self.worker_of(attempt), (node.node_id, attempt.attempt) in had_effect)
            for node in self.execution.nodes
            for attempt in node.attempts
        ]
        return sorted(rows, key=lambda row: (row.attempt.started_ms, STEPS.index(row.node.node_id)))

    @property
    def begun_ms(self) -> int:
        """The start time of the first attempt. Timelines count from this time."""
        rows = self.rows
        return rows[0].attempt.started_ms if rows else self.execution.created_ms

    def worker_of(self, attempt: Attempt) -> SeenWorker | None:
        """Return the worker of an attempt, or None if the demo didn't start that worker."""
        return next((worker for worker in self.workers if worker.owns(attempt.worker_id)), None)

    def steps_of(self, worker: SeenWorker) -> list[str]:
        """Return the steps whose recorded outputs came from this worker."""
        return [
            row.node.node_id for row in self.rows if row.worker is worker and row.attempt.outcome is Outcome.COMPLETED
        ]

    @property
    def resumptions(self) -> list[tuple[SeenWorker, str]]:
        """Each worker that took over from a dead worker, with the first step that the new worker took."""
        found: list[tuple[SeenWorker, str]] = []
        for worker in self.workers[1:]:
            steps = [row.node.node_id for row in self.rows if row.worker is worker]
            if steps:
                found.append((worker, steps[0]))
        return found

    @property
    def repeated(self) -> list[Node]:
        """The steps that were handed out more than once."""
        return [node for node in self.execution.nodes if len(node.attempts) > 1]

    @property
    def report(self) -> str:
        """The output of the step `report`, in Markdown; "" if that step was not recorded."""
        output = self.execution.outputs().get("report")
        return str(json.loads(output)["markdown"]) if output is not None else ""


def problems(run: PipelineRun) -> list[str]:
    """Return a sentence for each failed check of a run, or [] if every check passed."""
    execution = run.execution
    if execution.status is not ExecutionStatus.COMPLETED:
        why = next((node.error for node in execution.nodes if node.status is NodeStatus.FAILED), execution.error)
        return [f"the execution is {execution.status.value}, not COMPLETED{f': {why}' if why else ''}"]
    found: list[str] = []
    for node in execution.nodes:
        recorded = [attempt for attempt in node.attempts if attempt.outcome is Outcome.COMPLETED]
        if len(recorded) != 1 or recorded[0] is not node.attempts[-1]:
            found.append(f"{node.node_id} was recorded {len(recorded)} times in {len(node.attempts)} attempts")
    found += [
        f"{row.node.node_id} was taken by {row.attempt.worker_id}, which this demo did not start"
        for row in run.rows
        if row.worker is None
    ]
    return found + _recorded_steps_run_again(run) + _effects_amiss(run) + _crash_amiss(run)


def _recorded_steps_run_again(run: PipelineRun) -> list[str]:
    found: list[str] = []
    for number, dead in enumerate(run.workers):
        for step, output in (dead.recorded or {}).items():
            if run.execution.outputs().get(step) != output:
                found.append(f"the output of {step} changed after it was recorded")
            again = [row for row in run.rows if row.node.node_id == step and row.worker in run.workers[number + 1 :]]
            if again:
                found.append(f"{step} was recorded when {dead.name} died, but ran again")
    return found


def _effects_amiss(run: PipelineRun) -> list[str]:
    found: list[str] = []
    for row in run.rows:
        mine = [one for one in run.effects if (one.step, one.attempt) == (row.node.node_id, row.attempt.attempt)]
        if len(mine) > 1 or (row.attempt.outcome is Outcome.COMPLETED and not mine):
            found.append(f"attempt {row.attempt.attempt} at {row.node.node_id} had its effect {len(mine)} times")
    for node in run.execution.nodes:
        if len({effect.idempotency_key for effect in run.effects if effect.step == node.node_id}) > 1:
            found.append(f"the attempts at {node.node_id} had different idempotency keys")
    return found


def _crash_amiss(run: PipelineRun) -> list[str]:
    first, step = run.workers[0], run.point.step
    if not first.death:
        return [f"{first.name} did not die: the crash {run.point} did not happen"]
    if step in run.steps_of(first) and run.point.within:
        return [f"{first.name} recorded {step} before it died"]
    after = STEPS[STEPS.index(step) + 1 :]
    later = [row.node.node_id for row in run.rows if row.worker is first and row.node.node_id in after]
    return [f"{first.name} took {later[0]} after {step} was recorded"] if later else []


def remarks(run: PipelineRun) -> list[str]:
    """Tell where the run was resumed, whether the first worker died before its crash point, and what ran again."""
    said: list[str] = []
    dead = [worker for worker in run.workers if worker.death]
    if dead and run.resumptions:
        kept = list((dead[0].recorded or {}).keys())
        _, step = run.resumptions[0]
        said.append(f"Recorded when {dead[0].name} died: {', '.join(kept) or 'nothing'}. Resumed at: {step}.")
    if dead and not _died_at_crash_point(run):
        said.append(f"{run.workers[0].name} was to die {run.point}, but died earlier from another cause.")
    for node in run.repeated:
        tried = "; ".join(f"attempt {row.attempt.attempt} {row.outcome}" for row in run.rows if row.node is node)
        said.append(f"Ran again: {node.node_id} ({tried}). Its effect happened {effect_times(run, node)}.")
    if dead and not _recorded_steps_run_again(run):
        said.append("No recorded step ran again." if run.repeated else "No step ran again.")
    return said


def effect_times(run: PipelineRun, node: Node) -> str:
    """Return a phrase that tells how often a step's effect happened."""
    number = sum(effect.step == node.node_id for effect in run.effects)
    return {1: "once", 2: "twice"}.get(number, f"{number} times")


def _died_at_crash_point(run: PipelineRun) -> bool:
    first, point = run.workers[0], run.point
    if not point.within:
        return point.step in (first.recorded or {})
    return any(
        row.node.node_id == point.step and row.worker is first and row.is_lost and row.had_effect for row in run.rows
    )


def result_in_words(node: Node) -> str:
    """Return a summary of a step's recorded output, for a progress line."""
    if node.output_json is None:
        return ""
    output: dict[str, Any] = json.loads(node.output_json)
    match node.node_id:
        case "research":
            pages = len({claim["url"] for claim in output["claims"]})
            return f"{_count(len(output['claims']), 'claim')} from {_count(pages, 'page')}"
        case "validate":
            return f"{_count(len(output['kept']), 'claim')} kept, {len(output['dropped'])} dropped"
        case "summarize":
            return _count(len(output["text"].split()), "word")
        case _:
            return f"{_count(len(output['markdown'].split()), 'word')} of Markdown"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
