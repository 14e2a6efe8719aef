"""Derive the attempts of a run from the effect log. A published Nexum server records no attempts, only results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from nexum_engine.records import Attempt, Execution, Node, NodeStatus, Outcome
from pipeline_workflow import STEPS
from support.pipeline.effects import Effect


def attempts_of_effects(execution: Execution, effects: Sequence[Effect]) -> tuple[Execution, list[Effect]]:
    """Make an attempt from each logged effect.

    Return the execution with these attempts, and the effects with the attempts' numbers.
    """
    nodes: list[Node] = []
    numbered: list[Effect] = []
    for step in STEPS:
        output = execution.outputs().get(step)
        mine = [effect for effect in effects if effect.step == step]
        attempts: list[Attempt] = []
        for number, effect in enumerate(mine, start=1):
            numbered.append(effect.model_copy(update={"attempt": number}))
            is_last = number == len(mine)
            outcome = Outcome.LOST if not is_last else Outcome.RUNNING if output is None else Outcome.COMPLETED
            ended_ms = None if outcome is Outcome.RUNNING else effect.at_ms
            reason = "its worker did not report it" if outcome is Outcome.LOST else ""
            attempts.append(Attempt(number, effect.worker_id, effect.begun_ms, ended_ms, outcome, reason))
        status = NodeStatus.COMPLETED if output is not None else NodeStatus.RUNNING if mine else NodeStatus.PENDING
        nodes.append(Node(step, "EFFECT", status, output, "", tuple(attempts)))
    begun_ms = min((effect.begun_ms for effect in effects), default=0)
    return replace(execution, created_ms=begun_ms, nodes=tuple(nodes)), numbered
