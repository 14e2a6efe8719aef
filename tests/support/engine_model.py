"""A small model of the engine in memory, written from docs/workflows.md, docs/architecture.md and docs/wire.md.

It has no database, and no ids of its own. A test runs the same operations on the engine and on the model, and compares
their states.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from itertools import count, groupby
from typing import Any

from nexum_engine.errors import Conflict, IdempotencyConflict, InvalidRequest, NexumError, NotFound

LEASE_MS = 30_000
UNSTREAMED_LEASE_MS = 2 * LEASE_MS
RECONNECT_MS = 1_000
RESTART_MS = 1_500
LIMIT_GRACE_MS = 1_000
MAX_LOSSES = 10
DONE = ("COMPLETED", "SKIPPED")
FAILED = ("FAILED", "CANCELLED")
ENDED = (*DONE, *FAILED)
ROUTED = "routed_to"
SERVER_SIDE = ("TIMER", "HUMAN_APPROVAL", "EVENT")


class Anything:
    """A stand-in for a value that the model can't know. `same` finds it equal to every value."""


def same(expected: object, found: object) -> bool:
    """Return whether two JSON values are the same. 1, 1.0 and true are three values."""
    if isinstance(expected, Anything):
        return True
    if type(expected) is not type(found):
        return False
    if isinstance(expected, dict) and isinstance(found, dict):
        return expected.keys() == found.keys() and all(same(expected[name], found[name]) for name in expected)
    if isinstance(expected, list) and isinstance(found, list):
        return len(expected) == len(found) and all(map(same, expected, found))
    return expected == found


def parsed(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except ValueError:
        raise InvalidRequest("not JSON") from None


@dataclass(eq=False)
class Attempt:
    node: Node
    number: int
    worker: str
    task_id: str
    started: int
    streamed: bool
    outcome: str = "RUNNING"
    said: Any = None
    """What its worker reported."""
    can_resume: bool = True
    """Whether an UNKNOWN attempt continues if its worker comes back."""

    @property
    def is_newest(self) -> bool:
        return self.node.attempts[-1] is self


@dataclass(eq=False)
class Node:
    run: Run
    name: str
    spec: Mapping[str, Any]
    status: str = "PENDING"
    output: Any = None
    attempts: list[Attempt] = field(default_factory=list)
    failed: int = 0
    lost: int = 0
    due: int | None = None
    """The time at which a READY node becomes a task, a RUNNING node's lease ends, or a WAITING node's wait ends."""
    began: int = 0
    """The time at which the node began to wait for a time, a person or an event."""
    lease_loss: str = ""
    progress: Any = None
    timed_out: bool = False
    must_reconcile: bool = False
    children: list[Run] = field(default_factory=list)

    @property
    def kind(self) -> str:
        return str(self.spec["type"])

    @property
    def once(self) -> bool:
        return self.spec.get("effect") == "once"

    @property
    def is_unknown(self) -> bool:
        return self.status == "WAITING" and self.kind == "EFFECT"

    @property
    def policy(self) -> Mapping[str, Any]:
        return self.spec.get("retry_policy") or ({"max_attempts": 1} if self.once else {})

    @property
    def needs(self) -> set[str]:
        return {*self.spec["dependencies"], *filter(None, [self.spec.get("mapNodeId")])}

    @property
    def targets(self) -> set[str]:
        targets = {route["target"] for route in self.spec.get("routes", ())}
        return targets | set(filter(None, [self.spec.get("on_timeout")]))

    @property
    def choice(self) -> str | None:
        """The target that this node chose."""
        if self.kind == "ROUTER" and self.status == "COMPLETED":
            return str(self.output[ROUTED])
        return self.spec.get("on_timeout") if self.timed_out else None

    def delay_ms(self) -> int | None:
        policy = self.policy
        if self.failed >= policy.get("max_attempts", 4):
            return None
        delay: float = policy.get("first_delay_seconds", 1.0) * policy.get("factor", 2.0) ** (self.failed - 1)
        return round(1000 * delay)

    def limit_ms(self) -> int | None:
        limit = self.spec.get("timeout_seconds")
        return None if limit is None else round(1000 * limit) + LIMIT_GRACE_MS

    def until(self, started: int, due: int) -> int:
        limit = self.limit_ms()
        return due if limit is None else min(due, started + limit)


@dataclass(eq=False)
class Run:
    """An execution."""

    number: int
    workflow: str
    version: str
    input: Any
    key: str = ""
    parent: Node | None = None
    index: int | None = None
    nodes: dict[str, Node] = field(default_factory=dict)
    status: str = "RUNNING"
    error: str = ""
    last: Any = None
    """The output of the node that completed last."""
    events: list[tuple[str, Any]] = field(default_factory=list)
    """The events that no node has used."""
    sent: dict[str, tuple[str, Any]] = field(default_factory=dict)
    id: str = ""


class Model:
    def __init__(self, now: int, *, knows_time: bool = True) -> None:
        self.now = now
        self.knows_time = knows_time
        self.versions: dict[str, list[str]] = {}
        self.definitions: dict[str, dict[str, Mapping[str, Any]]] = {}
        """The nodes of each version, in the engine's order."""
        self.runs: list[Run] = []
        self.attempts: dict[str, Attempt] = {}
        self.keys: dict[object, str] = {}
        self._numbers = count()

    # ---- What can be done ------------------------------------------------------------------------------------------

    def register(self, workflow: str, version: str, nodes: Mapping[str, Mapping[str, Any]]) -> None:
        self.versions.setdefault(workflow, []).append(version)
        self.definitions[version] = dict(nodes)

    def start(self, workflow: str, version: str, given: object, key: str) -> tuple[Run, bool]:
        """Return the execution, and whether it existed before this start."""
        if key:
            runs = [run for run in self.runs if (run.workflow, run.key) == (workflow, key)]
            if runs and not same(runs[-1].input, given):
                raise IdempotencyConflict("another input")
            runs_once = bool(runs) and any(node.once for node in runs[-1].nodes.values())
            if runs and (runs[-1].status in ("RUNNING", "COMPLETED") or runs_once):
                return runs[-1], True
        if version not in self.versions.get(workflow, ()):
            raise NotFound("no such version")
        return self._begin(workflow, version, given, key), False

    def tasks(self, versions: Collection[str]) -> list[Node]:
        """Return the tasks that a poll may get: those that have been due the longest."""
        due = [
            node
            for node in self.nodes()
            if node.status == "READY" and node.run.version in versions and (node.due or 0) <= self.now
        ]
        return [node for node in due if node.due == min(other.due or 0 for other in due)]

    def hand_out(self, node: Node, worker: str, task_id: str, streamed: bool) -> Attempt:
        lease = LEASE_MS if streamed else UNSTREAMED_LEASE_MS
        attempt = Attempt(node, len(node.attempts) + 1, worker, task_id, self.now, streamed)
        node.attempts.append(attempt)
        node.status, node.due, node.lease_loss = "RUNNING", node.until(self.now, self.now + lease), "EXPIRED"
        self.attempts[task_id] = attempt
        return attempt

    def complete(self, task_id: str, text: str) -> None:
        output = parsed(text)
        attempt = self._attempt(task_id)
        node = attempt.node
        newest = node.attempts[-1]
        is_same_worker = newest.worker == attempt.worker and not newest.streamed
        if attempt.outcome in ("EXPIRED", "INTERRUPTED") and is_same_worker:
            attempt = node.attempts[-1]
        if node.kind == "SUBWORKFLOW" and isinstance(output, dict) and isinstance(output.get("subWorkflowId"), str):
            output = {"subWorkflowId": output["subWorkflowId"], "childInput": output.get("childInput")}
        if attempt.outcome == "COMPLETED" and same(attempt.said, output):
            return
        self._check_may_report(attempt)
        self._check_fits(node, output)
        attempt.outcome, attempt.said = "COMPLETED", output
        if node.kind == "MAP" and output:
            node.status, node.due = "WAITING", None
            spec = {**{n: node.spec[n] for n in ("retry_policy", "timeout_seconds") if n in node.spec}}
            spec |= {"type": "MAP_SUBTASK", "dependencies": []}
            for index, item in enumerate(output):
                run = Run(next(self._numbers), node.run.workflow, node.run.version, item, parent=node, index=index)
                run.nodes = {f"{node.name}__{index}": Node(run, f"{node.name}__{index}", spec, "READY", due=self.now)}
                node.children.append(run)
                self.runs.append(run)
        elif node.kind == "SUBWORKFLOW":
            node.status, node.due = "WAITING", None
            workflow = output["subWorkflowId"]
            self._begin(workflow, self.versions[workflow][-1], output["childInput"], "", node)
        else:
            self._complete(node, output)
            self._advance(node.run)

    def fail(self, task_id: str, error: str, final: bool, unknown: bool) -> None:
        attempt = self._attempt(task_id)
        node = attempt.node
        if attempt.outcome in ("FAILED", "UNKNOWN") and attempt.said == error:
            return
        self._check_may_report(attempt)
        if attempt.outcome in ("LOST", "EXPIRED"):
            node.lost -= 1
        if unknown and node.kind == "EFFECT":
            attempt.said = error
            if node.spec.get("reconcile") and not node.must_reconcile:
                attempt.outcome, node.status, node.due, node.must_reconcile = "FAILED", "READY", self.now, True
            else:
                self._ask_person(attempt, can_resume=False)
            return
        attempt.said = error
        self._count_failure(attempt, "FAILED", final)

    def approve(self, run_id: str, name: str, approver: str, comment: str, answer: object) -> None:
        node = self._decided(run_id, name)
        decided_ms = self.now if self.knows_time else Anything()
        decision = {"approved": True, "approver": approver, "comment": comment, "decided_ms": decided_ms}
        self._note_decision(node, approver, "COMPLETED")
        self._complete(node, decision if answer is None else {**decision, "answer": answer})
        self._advance(node.run)

    def reject(self, run_id: str, name: str, approver: str) -> None:
        node = self._decided(run_id, name)
        self._note_decision(node, approver, "FAILED")
        self._fail(node)

    def resolve(self, run_id: str, name: str, by: str, decision: str, text: str, attempt: int) -> None:
        """Resolve a node as "done" with the result `text`, as "not done", or as "failed" with the reason `text`."""
        output = parsed(text) if decision == "done" else None
        node = self.run(run_id).nodes.get(name)
        if node is None:
            raise NotFound("no such node")
        if not node.is_unknown:
            raise Conflict("not now")
        earlier = [one for one in node.attempts[:-1] if one.outcome == "UNKNOWN"]
        if attempt != node.attempts[-1].number and (attempt or earlier):
            raise Conflict("another attempt")
        self._note_decision(node, by, "COMPLETED" if decision == "done" else "FAILED")
        if decision == "done":
            self._complete(node, output)
            self._advance(node.run)
        elif decision == "not done":
            node.status, node.due, node.failed, node.lost, node.must_reconcile = "READY", self.now, 0, 0, False
        else:
            self._fail(node)

    def _note_decision(self, node: Node, by: str, outcome: str) -> None:
        node.attempts.append(Attempt(node, len(node.attempts) + 1, by, "", self.now, True, outcome))

    def send(self, run_id: str, name: str, payload: object, key: str) -> None:
        run = self.run(run_id)
        if key in run.sent:
            if not same(list(run.sent[key]), [name, payload]):
                raise IdempotencyConflict("another event")
            return
        if run.status != "RUNNING":
            raise Conflict("ended")
        if run.index is not None or name not in {node.spec.get("event") for node in run.nodes.values()}:
            raise NotFound("no such event")
        if key:
            run.sent[key] = (name, payload)
        waiting = [one for one in run.nodes.values() if one.status == "WAITING" and one.spec.get("event") == name]
        if waiting:
            self._complete(waiting[0], payload)
            self._advance(run)
        else:
            run.events.append((name, payload))

    def cancel(self, run_id: str) -> None:
        run = self.run(run_id)
        if run.status == "CANCELLED":
            return
        if run.status != "RUNNING":
            raise Conflict("ended")
        self._end(run, "CANCELLED")

    def retry(self, run_id: str) -> None:
        run = self.run(run_id)
        newest = [one for one in self.runs if run.key and (one.workflow, one.key) == (run.workflow, run.key)]
        if run.status != "FAILED" or run.parent is not None or (newest and newest[-1] is not run):
            raise Conflict("can't be retried")
        self._reopen(run)

    def pending_approvals(self) -> set[tuple[str, str]]:
        return {(n.run.id, n.name) for n in self.nodes() if n.status == "WAITING" and n.kind == "HUMAN_APPROVAL"}

    def unknown_nodes(self) -> set[tuple[str, str]]:
        return {(node.run.id, node.name) for node in self.nodes() if node.is_unknown}

    # ---- Leases and time -------------------------------------------------------------------------------------------

    def beat(self, worker: str, task_ids: Collection[str], progress: Mapping[str, object]) -> set[str]:
        """Receive a heartbeat that names these tasks. Return those of them that the worker has lost."""
        lost = set()
        for task_id in task_ids:
            attempt = self.attempts.get(task_id)
            if attempt is None or attempt.worker != worker or not attempt.is_newest:
                lost.add(task_id)
                continue
            node = attempt.node
            is_over = attempt.outcome in ("LOST", "EXPIRED", "INTERRUPTED")
            is_over = is_over or (attempt.outcome == "UNKNOWN" and attempt.can_resume)
            if is_over and node.run.status == "RUNNING":
                node.lost -= attempt.outcome in ("LOST", "EXPIRED")
                node.status, attempt.outcome = "RUNNING", "RUNNING"
            if attempt.outcome != "RUNNING":
                lost.add(task_id)
                continue
            attempt.streamed, node.lease_loss = True, "EXPIRED"
            node.due = node.until(attempt.started, self.now + LEASE_MS)
        for task_id, value in progress.items():
            attempt = self.attempts[task_id]
            if attempt.worker == worker and attempt.is_newest and attempt.outcome == "RUNNING":
                attempt.node.progress = value
        return lost

    def disconnect(self, worker: str) -> None:
        for attempt in self.running():
            if attempt.worker == worker and attempt.streamed:
                attempt.node.due = min(attempt.node.due or 0, self.now + RECONNECT_MS)
                attempt.node.lease_loss = "LOST"

    def restart(self) -> None:
        for attempt in self.running():
            grace = RESTART_MS if attempt.streamed else UNSTREAMED_LEASE_MS
            attempt.node.due = attempt.node.until(attempt.started, self.now + grace)
            attempt.node.lease_loss = "INTERRUPTED"
        # If the clock was set back, no wait is longer than a wait that begins now.
        for node in self.nodes():
            if node.status == "READY" and node.due is not None:
                node.due = min(node.due, self.now + ((node.delay_ms() or 0) if node.attempts else 0))
            elif node.status == "WAITING" and node.due is not None and node.began > self.now:
                node.due, node.began = self.now + node.due - node.began, self.now

    def release(self, task_id: str) -> None:
        attempt = self.attempts[task_id]
        if attempt.outcome == "RUNNING":
            attempt.outcome, attempt.node.status, attempt.node.due = "INTERRUPTED", "READY", self.now

    def lose(self, attempt: Attempt, outcome: str, *, may_have_begun: bool) -> None:
        node = attempt.node
        is_last = node.lost + (outcome != "INTERRUPTED") >= MAX_LOSSES
        if node.once and (is_last or (may_have_begun and not node.spec.get("reconcile"))):
            self._ask_person(attempt, can_resume=outcome != "TIMED_OUT")
            return
        node.must_reconcile |= node.once and may_have_begun
        node.lost += outcome != "INTERRUPTED"
        attempt.outcome = outcome
        if node.lost >= MAX_LOSSES:
            self._fail(node)
        else:
            node.status, node.due = "READY", self.now

    def sweep(self) -> None:
        expired = [attempt for attempt in self.running() if (attempt.node.due or 0) <= self.now]
        for attempt in sorted(expired, key=lambda one: one.node.due or 0):
            if attempt.outcome != "RUNNING":
                continue  # meanwhile, the end of an execution has cancelled this attempt
            limit = attempt.node.limit_ms()
            is_late = limit is not None and attempt.started + limit <= self.now
            if is_late and not attempt.node.once:
                self._count_failure(attempt, "TIMED_OUT", final=False)
            else:
                self.lose(attempt, "TIMED_OUT" if is_late else attempt.node.lease_loss, may_have_begun=True)
        waiting = [n for n in self.nodes() if n.status == "WAITING" and n.due is not None and n.due <= self.now]
        waiting.sort(key=lambda one: one.due or 0)
        for (_, run), together in groupby(waiting, key=lambda one: (one.due, one.run)):
            for node in together:
                if node.status != "WAITING":
                    continue  # meanwhile, the end of an execution has cancelled this node
                if node.kind == "TIMER":
                    self._complete(node, self._timer_output(node))
                elif node.spec.get("on_timeout"):
                    node.status, node.timed_out = "SKIPPED", True
                else:
                    self._fail(node)
            if run.status == "RUNNING":
                self._advance(run)

    # ---- Reading ---------------------------------------------------------------------------------------------------

    def run(self, run_id: str) -> Run:
        for run in self.runs:
            if run.id == run_id:
                return run
        raise NotFound("no such execution")

    def nodes(self) -> Iterator[Node]:
        """Return the nodes of all executions, in the order of the executions' starts."""
        for run in sorted(self.runs, key=lambda run: run.number):
            yield from run.nodes.values()

    def running(self) -> list[Attempt]:
        return [node.attempts[-1] for node in self.nodes() if node.status == "RUNNING"]

    def task_input(self, node: Node) -> object:
        if node.kind == "MAP_SUBTASK":
            assert node.run.parent is not None
            node = node.run.parent
        others = node.run.nodes
        deps = {name: others[name].output for name in node.needs if others[name].status == "COMPLETED"}
        return {"input": node.run.input, "deps": deps}

    # ---- What follows ----------------------------------------------------------------------------------------------

    def _begin(self, workflow: str, version: str, given: object, key: str, parent: Node | None = None) -> Run:
        run = Run(next(self._numbers), workflow, version, given, key, parent)
        run.nodes = {name: Node(run, name, spec) for name, spec in self.definitions[version].items()}
        if parent is not None:
            parent.children.append(run)
        self.runs.append(run)
        self._advance(run)
        return run

    def _advance(self, run: Run) -> None:
        """Begin the nodes that wait for no other node, until none is left. End the execution if all nodes are done."""
        while True:
            fates = self._fates(run)
            if not fates:
                break
            for node, is_skipped in fates:
                if is_skipped:
                    node.status = "SKIPPED"
                elif node.kind not in SERVER_SIDE:
                    node.status, node.due = "READY", self.now
                else:
                    self._wait(node)
        if all(node.status in DONE for node in run.nodes.values()):
            self._end(run, "COMPLETED")

    def _fates(self, run: Run) -> list[tuple[Node, bool]]:
        """Return the PENDING nodes that wait for no other node, and whether each is skipped."""
        fates = []
        skipped: set[str] = set()
        for node in run.nodes.values():
            routers = [one for one in run.nodes.values() if node.name in one.targets]
            before = {*node.needs, *(one.name for one in routers)}
            if node.status != "PENDING" or not all(n in skipped or run.nodes[n].status in DONE for n in before):
                continue
            if routers:
                is_skipped = all(one.choice != node.name for one in routers)
            else:
                is_skipped = bool(node.needs) and all(
                    n in skipped or run.nodes[n].status == "SKIPPED" for n in node.needs
                )
            if is_skipped:
                skipped.add(node.name)
            fates.append((node, is_skipped))
        return fates

    def _wait(self, node: Node) -> None:
        node.status, node.began = "WAITING", self.now
        if node.kind == "TIMER":
            node.due = self.now + 1 + round(1000 * node.spec["delay_seconds"])  # + 1, because `now` is rounded down
            if not node.spec["delay_seconds"]:
                self._complete(node, self._timer_output(node))
            return
        limit = node.spec.get("timeout_seconds")
        node.due = None if limit is None else self.now + 1 + round(1000 * limit)
        if node.kind == "EVENT":
            kept = [event for event in node.run.events if event[0] == node.spec["event"]]
            if kept:
                node.run.events.remove(kept[0])
                self._complete(node, kept[0][1])

    def _timer_output(self, node: Node) -> object:
        now = datetime.fromtimestamp(self.now / 1000, tz=timezone.utc).isoformat(timespec="milliseconds")
        return {
            "waited_until": now if self.knows_time else Anything(),
            "delay_seconds": node.spec["delay_seconds"],
        }

    def _complete(self, node: Node, output: object) -> None:
        node.status, node.output, node.run.last = "COMPLETED", output, output

    def _fail(self, node: Node) -> None:
        node.status = "FAILED"
        node.run.error = node.name
        self._end(node.run, "FAILED")

    def _end(self, run: Run, status: str) -> None:
        assert run.status == "RUNNING"
        run.status = status
        if status != "COMPLETED":
            for one in run.nodes.values():
                if one.status == "RUNNING":
                    one.attempts[-1].outcome = "CANCELLED"
                if one.status not in ENDED:
                    one.status = "CANCELLED"
            for child in [child for one in run.nodes.values() for child in one.children]:
                if child.status == "RUNNING":
                    self._end(child, "CANCELLED")
        node = run.parent
        if node is None or node.status != "WAITING":
            return
        if status != "COMPLETED":
            self._fail(node)
        elif run.index is None:
            self._complete(node, run.last)
            self._advance(node.run)
        elif all(child.status == "COMPLETED" for child in node.children):
            self._complete(node, [child.last for child in node.children])
            self._advance(node.run)

    def _reopen(self, run: Run) -> None:
        run.status, run.error = "RUNNING", ""
        without = {node: [child for child in node.children if child.status in FAILED] for node in run.nodes.values()}
        for node, children in without.items():
            if node.status not in FAILED:
                continue
            last = node.attempts[-1] if node.attempts else None
            was_cut_off = node.once and last is not None and last.outcome == "CANCELLED"
            reconciles = bool(node.spec.get("reconcile"))
            node.must_reconcile |= was_cut_off and reconciles
            if last is not None and was_cut_off and not reconciles:
                last.outcome = "UNKNOWN"
            waits = children or (last is not None and last.outcome == "UNKNOWN")
            node.status, node.due, node.failed, node.lost = "WAITING" if waits else "PENDING", None, 0, 0
        for child in sorted((child for some in without.values() for child in some), key=lambda child: child.number):
            self._reopen(child)
        self._advance(run)

    def _count_failure(self, attempt: Attempt, outcome: str, final: bool) -> None:
        node = attempt.node
        attempt.outcome = outcome
        node.failed += 1
        delay = None if final else node.delay_ms()
        if delay is None:
            self._fail(node)
        else:
            node.status, node.due = "READY", self.now + delay

    def _ask_person(self, attempt: Attempt, *, can_resume: bool) -> None:
        attempt.outcome, attempt.can_resume = "UNKNOWN", can_resume
        attempt.node.status, attempt.node.due = "WAITING", None

    # ---- Refusals --------------------------------------------------------------------------------------------------

    def _attempt(self, task_id: str) -> Attempt:
        if task_id not in self.attempts:
            raise NotFound("no such task")
        return self.attempts[task_id]

    def _check_may_report(self, attempt: Attempt) -> None:
        over = attempt.outcome in ("COMPLETED", "FAILED", "TIMED_OUT") or not attempt.is_newest
        if over or attempt.node.run.status != "RUNNING":
            raise Conflict("the attempt is over")

    def _check_fits(self, node: Node, output: object) -> None:
        misfit = InvalidRequest("a result that doesn't fit")
        if node.kind == "ROUTER" and not (isinstance(output, dict) and output.get(ROUTED) in list(node.targets)):
            raise misfit
        if node.kind == "MAP" and not isinstance(output, list):
            raise misfit
        if node.kind == "SUBWORKFLOW":
            if not (isinstance(output, dict) and isinstance(output.get("subWorkflowId"), str)):
                raise misfit
            if output["subWorkflowId"] not in self.versions:
                raise NotFound("no such workflow")

    def _decided(self, run_id: str, name: str) -> Node:
        node = self.run(run_id).nodes.get(name)
        if node is None or node.kind != "HUMAN_APPROVAL":
            raise NotFound("no such node")
        is_late = node.due is not None and node.due <= self.now  # even if no sweep has ended the wait yet
        if node.status != "WAITING" or is_late:
            raise Conflict("not now")
        return node


def kind_of(error: NexumError) -> type[NexumError]:
    """Return the class of an error that a program may catch. The engine and the model must raise the same one."""
    for kind in (IdempotencyConflict, Conflict, NotFound, InvalidRequest):
        if isinstance(error, kind):
            return kind
    raise AssertionError(f"an unexpected error: {error!r}")


def specs_in(order: Sequence[str], nodes: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Check that the engine's order has each node after the nodes that it waits for. Return the nodes in this order."""
    assert sorted(order) == sorted(nodes)
    place = {name: position for position, name in enumerate(order)}
    for name, spec in nodes.items():
        after = {route["target"] for route in spec.get("routes", ())} | set(filter(None, [spec.get("on_timeout")]))
        before = {*spec["dependencies"], *filter(None, [spec.get("mapNodeId")])}
        assert all(place[one] < place[name] for one in before)
        assert all(place[name] < place[one] for one in after)
    return {name: nodes[name] for name in order}
