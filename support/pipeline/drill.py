"""Run a drill: start a pipeline, let its first worker die, and start more workers until the pipeline is finished.

Every printed line about the pipeline comes from the server's records. The drill only starts workers and sees them end.
A drill has its own version of the workflow. So no other worker takes its steps, and its workers take no other steps.
"""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import replace

from nexum_engine.client import NexumClient
from nexum_engine.embedded import Child, start_child
from nexum_engine.errors import NexumError
from nexum_engine.event_loop import to_its_end
from nexum_engine.records import Attempt, Execution, Node, NodeStatus, Outcome
from pipeline_workflow import OFFLINE_PIPELINE, PIPELINE, STEPS, PipelineInput, drill_version
from support.console import say
from support.pipeline.effects import Effect, EffectLog
from support.pipeline.evidence import NO_CRASH, CrashPoint, PipelineRun, SeenWorker, result_in_words
from support.pipeline.published import attempts_of_effects
from support.processes import CANT_RUN, ROOT, DrillFailed, death_in_words

WORKER = "pipeline_worker.py"
LOOK_INTERVAL = 0.1  # seconds between two reads of the record
SAY_WAITING_EVERY = 10.0  # seconds
SERVER_PATIENCE = 30.0  # seconds to wait for a killed server to be started again
MAX_WORKERS = 12  # after this many deaths, assume that the next worker would die, too


class Drill:
    """One run of the pipeline, in the drill's own version of the workflow. Call `run` once."""

    def __init__(
        self, client: NexumClient, query: str, point: CrashPoint, effects: EffectLog, *, offline: bool
    ) -> None:
        self._client = client
        self._name = uuid.uuid4().hex[:8]
        self._workflow = drill_version(OFFLINE_PIPELINE if offline else PIPELINE, self._name)
        self._query = query
        self._point = point
        self._effects = effects
        self._offline = offline
        self._workers: list[SeenWorker] = []
        self._child: Child | None = None  # the process of the newest worker
        self._told: set[tuple[str, int]] = set()
        self._execution_id = ""

    async def run(self) -> PipelineRun:
        """Start an execution, run workers until it ends, and return the run. On an error, cancel the execution."""
        await self._client.register_workflow(self._workflow, patience=SERVER_PATIENCE)
        started = await self._client.start_execution(
            self._workflow, PipelineInput(query=self._query), idempotency_key=self._name, patience=SERVER_PATIENCE
        )
        self._execution_id = started.execution_id
        try:
            say(f'[demo] Pipeline {self._execution_id}: "{self._query}"')
            while not await self._one_worker():
                if len(self._workers) == MAX_WORKERS:
                    raise DrillFailed(f"{MAX_WORKERS} workers died one after the other; see above how each died")
        except BaseException:
            await self._cancel()  # cancel before ending the worker, so that the worker takes no further step
            raise
        finally:
            if self._child is not None:
                await to_its_end(self._child.end())
        execution, effects, source = await self._evidence()
        return PipelineRun(execution, self._query, self._point, tuple(self._workers), effects, source)

    async def _one_worker(self) -> bool:
        """Start a worker and follow it. Return True if the execution has ended, and False if the worker died first."""
        number = len(self._workers) + 1
        name = f"worker-{number}"
        self._child = child = await start_child(
            [
                *(str(ROOT / WORKER), "--nexum", self._client.address, "--drill", self._name, "--name", name),
                *("--effects", str(self._effects.path), *(["--offline"] if self._offline else [])),
            ],
            env=self._point.environment if number == 1 else NO_CRASH,
        )
        self._workers.append(SeenWorker(name, child.process.pid))
        fate = f"to be killed {self._point.in_words}" if number == 1 else f"in place of worker-{number - 1}"
        say(f"[demo] {name} started (pid {child.process.pid}), {fate}")
        execution = await self._follow(child)
        if execution.status.ended:
            return True
        self._note_death(name, child, execution)
        return False

    async def _follow(self, child: Child) -> Execution:
        """Print each attempt when its end is recorded. Return when the execution or the worker has ended."""
        loop = asyncio.get_running_loop()
        said_at = loop.time()
        ending = asyncio.ensure_future(child.process.wait())
        while True:
            # First check whether the worker has ended, then read the record. So if the worker has ended, this record
            # holds all that the worker reported.
            child_ended = child.ended
            execution, *_ = await self._evidence()
            if self._tell(execution):
                said_at = loop.time()
            if execution.status.ended or child_ended:
                return execution
            if loop.time() - said_at > SAY_WAITING_EVERY:
                said_at = loop.time()
                say(f"  {self._what_is_awaited(execution)}")
            # Don't use wait_for: before Python 3.12, wait_for loses a Ctrl+C that comes just when the worker ends.
            await asyncio.wait({ending}, timeout=LOOK_INTERVAL)

    async def _evidence(self) -> tuple[Execution, list[Effect], str]:
        """Return the recorded execution, the effects of its steps, and a phrase that tells where attempts come from."""
        observed = await self._client.get_execution(self._execution_id, with_attempts=True, patience=SERVER_PATIENCE)
        effects = self._effects.of(self._execution_id)
        if observed.has_poller is None:
            return *attempts_of_effects(observed.execution, effects), "the workers' own log"
        return observed.execution, effects, "the server's records"

    def _tell(self, execution: Execution) -> bool:
        """Print every attempt that ended since the last call of `_tell`. Return whether any attempt did."""
        ended = [
            (attempt.ended_ms, STEPS.index(node.node_id), node, attempt)
            for node in execution.nodes
            for attempt in node.attempts
            if attempt.ended_ms is not None and (node.node_id, attempt.attempt) not in self._told
        ]
        for ended_ms, _, node, attempt in sorted(ended, key=lambda entry: entry[:2]):
            self._told.add((node.node_id, attempt.attempt))
            say(f"  {node.node_id:<10} {_what_became_of(attempt, node, ended_ms - attempt.started_ms)}")
        return bool(ended)

    def _note_death(self, name: str, child: Child, execution: Execution) -> None:
        """Note and print how a worker died and which steps are recorded. Raises DrillFailed if the worker gave up."""
        code = child.process.returncode
        if code in CANT_RUN:
            raise DrillFailed(f"{name} gave up (exit {code}); see its error above")
        self._workers[-1] = replace(self._workers[-1], death=death_in_words(code), recorded=execution.outputs())
        say(f"[demo] {name} is dead: {death_in_words(code)}")
        states = [f"{node.node_id} {_state(node)}" for node in execution.nodes]
        say(f"[demo] On record: {', '.join(states)}")

    def _what_is_awaited(self, execution: Execution) -> str:
        for node in execution.nodes:
            if node.status is NodeStatus.RUNNING:
                attempt = node.attempts[-1]
                if self._workers[-1].owns(attempt.worker_id):
                    return f"{node.node_id:<10} still at work (attempt {attempt.attempt})"
                return f"{node.node_id:<10} waits until the server takes it back from {attempt.worker_id}"
            if node.status is NodeStatus.READY:
                return f"{node.node_id:<10} waits: {node.error or 'no worker has taken it yet'}"
        return "no step is queued or handed out"

    async def _cancel(self) -> None:
        try:
            if not (await self._client.get_execution(self._execution_id)).execution.status.ended:
                await self._client.cancel_execution(self._execution_id)
                say(f"[demo] Cancelled {self._execution_id}")
        except NexumError as error:
            say(
                f"[demo] Could not cancel {self._execution_id}: {error}. No worker takes its steps any more; "
                f"cancel it with: python -m nexum_engine cancel {self._execution_id}"
            )
        except BrokenPipeError:
            return  # raised by `say`, so the execution is already cancelled


def _state(node: Node) -> str:
    match node.status:
        case NodeStatus.COMPLETED:
            return "recorded"
        case NodeStatus.RUNNING:
            return "handed out but not recorded"
        case NodeStatus.READY:
            return "queued"
        case _:
            return "waiting"


def _what_became_of(attempt: Attempt, node: Node, took_ms: int) -> str:
    which = f"attempt {attempt.attempt} " if attempt.attempt > 1 else ""
    match attempt.outcome:
        case Outcome.COMPLETED:
            return f"{which}recorded after {took_ms / 1000:.2f} s: {result_in_words(node)}"
        case Outcome.FAILED:
            return f"attempt {attempt.attempt} failed: {attempt.error}"
        case _:
            return f"attempt {attempt.attempt} {attempt.outcome.value.lower()}: {attempt.error or 'no reason given'}"
