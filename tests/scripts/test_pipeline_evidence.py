"""The remarks, the problems and the timeline of a pipeline's run. The records are made by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from pipelines import ONE, TWO, Try, made_run, recorded_outputs

from nexum_engine.records import ExecutionStatus, NodeStatus, Outcome
from pipeline_workflow import STEPS
from support.pipeline.evidence import CrashPoint, PipelineRun, problems, remarks, result_in_words
from support.pipeline.timeline import WIDTH, timeline

KILLED = "killed by SIGKILL"
AFTER_VALIDATE = CrashPoint("validate")
DEAD = replace(ONE, death=KILLED, recorded=recorded_outputs("research", "validate"))
PLANNED = [
    Try("research", "worker-1", 0, 500),
    Try("validate", "worker-1", 510, 600),
    Try("summarize", "worker-2", 2000, 2100),
    Try("report", "worker-2", 2110, 2200),
]


def planned() -> PipelineRun:
    return made_run(PLANNED, [DEAD, TWO], AFTER_VALIDATE)


def within_summarize() -> PipelineRun:
    tries = [
        *PLANNED[:2],
        Try("summarize", "worker-1", 610, 1700, Outcome.LOST),
        *PLANNED[2:],
    ]
    return made_run(tries, [DEAD, TWO], CrashPoint("summarize", within=True))


# ---- Passed checks ---------------------------------------------------------------------------------------------------


def test_planned_crash_passes_and_names_the_resumed_step() -> None:
    assert problems(planned()) == []
    assert remarks(planned()) == [
        "Recorded when worker-1 died: research, validate. Resumed at: summarize.",
        "No step ran again.",
    ]


def test_kill_within_a_step_passes_and_names_the_repeated_step() -> None:
    assert problems(within_summarize()) == []
    assert remarks(within_summarize()) == [
        "Recorded when worker-1 died: research, validate. Resumed at: summarize.",
        "Ran again: summarize (attempt 1 lost, effect done; attempt 2 recorded). Its effect happened twice.",
        "No recorded step ran again.",
    ]


def test_attempt_lost_before_its_effect_is_reported_without_effect() -> None:
    run = within_summarize()
    run = replace(run, effects=[one for one in run.effects if (one.step, one.attempt) != ("summarize", 1)])
    assert problems(run) == []
    assert "attempt 1 lost, no effect" in remarks(run)[2]
    assert "Its effect happened once." in remarks(run)[2]
    assert remarks(run)[1] == "worker-1 was to die during summarize, but died earlier from another cause."


def test_early_death_of_a_worker_is_reported_and_passes() -> None:
    dead = replace(ONE, death=KILLED, recorded=recorded_outputs("research"))
    tries = [PLANNED[0], replace(PLANNED[1], worker="worker-2", start=1500, end=1600), *PLANNED[2:]]
    run = made_run(tries, [dead, TWO], AFTER_VALIDATE)
    assert problems(run) == []
    assert remarks(run)[:2] == [
        "Recorded when worker-1 died: research. Resumed at: validate.",
        "worker-1 was to die after validate, but died earlier from another cause.",
    ]


# ---- Failed checks ---------------------------------------------------------------------------------------------------


def test_run_without_a_death_is_a_problem() -> None:
    tries = [replace(one, worker="worker-1") for one in PLANNED]
    run = made_run(tries, [ONE], AFTER_VALIDATE)
    assert problems(run) == ["worker-1 did not die: the crash after validate did not happen"]


def test_crash_after_a_later_step_is_a_problem() -> None:
    dead = replace(DEAD, recorded=recorded_outputs("research", "validate", "summarize"))
    tries = [*PLANNED[:2], replace(PLANNED[2], worker="worker-1"), PLANNED[3]]
    assert problems(made_run(tries, [dead, TWO], AFTER_VALIDATE)) == [
        "worker-1 took summarize after validate was recorded"
    ]


def test_crash_within_a_step_that_was_recorded_is_a_problem() -> None:
    dead = replace(DEAD, recorded=recorded_outputs("research", "validate"))
    run = made_run(PLANNED, [dead, TWO], CrashPoint("validate", within=True))
    assert problems(run) == ["worker-1 recorded validate before it died"]


def test_repeated_recorded_step_is_a_problem() -> None:
    again = [*PLANNED[:2], Try("validate", "worker-2", 1900, 1950), *PLANNED[2:]]
    run = made_run(again, [DEAD, TWO], AFTER_VALIDATE)
    assert "validate was recorded 2 times in 2 attempts" in problems(run)
    assert "validate was recorded when worker-1 died, but ran again" in problems(run)
    assert "No recorded step ran again." not in remarks(run)


def test_changed_recorded_output_is_a_problem() -> None:
    dead = replace(DEAD, recorded={**recorded_outputs("research"), "validate": "{}"})
    assert problems(made_run(PLANNED, [dead, TWO], AFTER_VALIDATE)) == [
        "the output of validate changed after it was recorded"
    ]


def test_foreign_worker_is_a_problem() -> None:
    run = made_run([*PLANNED[:3], replace(PLANNED[3], worker="stranger")], [DEAD, TWO], AFTER_VALIDATE)
    assert problems(run) == ["report was taken by stranger-pid99, which this demo did not start"]


def test_missing_and_double_effects_of_an_attempt_are_problems() -> None:
    run = planned()
    assert problems(replace(run, effects=run.effects[1:])) == ["attempt 1 at research had its effect 0 times"]
    twice = replace(run, effects=[*run.effects, run.effects[0]])
    assert problems(twice) == ["attempt 1 at research had its effect 2 times"]


def test_different_idempotency_keys_of_a_step_are_a_problem() -> None:
    run = within_summarize()
    effects = [
        one.model_copy(update={"idempotency_key": f"{one.idempotency_key}-{one.attempt}"})
        if one.step == "summarize"
        else one
        for one in run.effects
    ]
    assert problems(replace(run, effects=effects)) == ["the attempts at summarize had different idempotency keys"]


@pytest.mark.parametrize("status", [ExecutionStatus.FAILED, ExecutionStatus.CANCELLED])
def test_failed_execution_is_a_problem_with_its_reason(status: ExecutionStatus) -> None:
    run = made_run(PLANNED[:1], [ONE], AFTER_VALIDATE, status=status)
    nodes = [
        replace(node, error="no key") if node.status is NodeStatus.FAILED else node for node in run.execution.nodes
    ]
    run = replace(run, execution=replace(run.execution, nodes=tuple(nodes)))
    assert problems(run) == [f"the execution is {status.value}, not COMPLETED: no key"]
    assert remarks(run) == []


# ---- The timeline ----------------------------------------------------------------------------------------------------


def test_the_timeline_has_a_row_for_each_attempt_and_the_death_between_them() -> None:
    assert timeline(within_summarize()).splitlines() == [
        "Timeline of exec-1 (from the server's records)",
        "",
        "STEP      ATTEMPT WORKER                     START s  TOOK s  OUTCOME",
        "research  1       worker-1-pid11               +0.00    0.50  recorded",
        "validate  1       worker-1-pid11               +0.51    0.09  recorded",
        "summarize 1       worker-1-pid11               +0.61    1.09  lost, effect done",
        "--- worker-1 died: killed by SIGKILL ------------------------------------------",
        "--- worker-2 resumes at summarize ---------------------------------------------",
        "summarize 2       worker-2-pid22               +2.00    0.10  recorded",
        "report    1       worker-2-pid22               +2.11    0.09  recorded",
    ]
    assert all(len(line) <= WIDTH for line in timeline(within_summarize()).splitlines())


def test_timeline_shows_workers_without_a_step_before_the_next_worker() -> None:
    one, two, three = (
        replace(ONE, death="exit 15", recorded={}),
        replace(TWO, death=KILLED, recorded={}),
        replace(ONE, name="worker-3"),
    )
    run = made_run([replace(each, worker="worker-3") for each in PLANNED], [one, two, three], AFTER_VALIDATE)
    assert timeline(run).splitlines()[3:6] == [
        "--- worker-1 died: exit 15 ----------------------------------------------------",
        "--- worker-2 died: killed by SIGKILL ------------------------------------------",
        "--- worker-3 resumes at research ----------------------------------------------",
    ]
    assert problems(run) == []
    assert remarks(run)[0] == "Recorded when worker-1 died: nothing. Resumed at: research."


def test_a_run_without_any_attempt_has_an_empty_timeline() -> None:
    run = made_run([], [ONE], AFTER_VALIDATE, status=ExecutionStatus.CANCELLED)
    assert len(timeline(run).splitlines()) == 3
    assert problems(run) == ["the execution is CANCELLED, not COMPLETED"]


def test_results_are_described_in_words() -> None:
    words = [result_in_words(node) for node in planned().execution.nodes]
    assert words == ["0 claims from 0 pages", "0 claims kept, 0 dropped", "4 words", "4 words of Markdown"]
    assert [node.node_id for node in planned().execution.nodes] == list(STEPS)


def test_a_crash_point_sets_one_variable_and_empties_the_other() -> None:
    assert CrashPoint("research").environment == {"CRASH_AFTER": "research", "CRASH_DURING": ""}
    assert CrashPoint("research", within=True).environment == {"CRASH_AFTER": "", "CRASH_DURING": "research"}
