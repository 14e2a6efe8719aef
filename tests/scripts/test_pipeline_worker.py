"""pipeline_worker.py as a process: its crash points, the record after a crash, and the work of a second worker."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
from harness import KILLED, running
from openai_server import OpenAIServer, Reply
from pipelines import (
    PIPELINE_WORKER,
    QUERY,
    RUST_PAGE,
    RUST_QUOTE,
    attempts,
    output_of,
    pipelines,
    record_research,
    start_pipeline,
)
from processes import run_script, wait_until
from server_thread import ServerThread

from pipeline_workflow import STEPS


def finish(folder: Path, server: ServerThread) -> dict[str, object]:
    """Run a worker until the only pipeline is done; return the pipeline's record."""
    with running([PIPELINE_WORKER, "--nexum", server.address, "--name", "second"], cwd=folder, forked=True):
        wait_until(lambda: pipelines(folder, server.address)[0]["status"] != "RUNNING", "the pipeline ends")
    return pipelines(folder, server.address)[0]


@pytest.mark.parametrize("step", STEPS)
def test_crash_after_kills_the_worker_before_it_takes_another_step(
    server: ServerThread, tmp_path: Path, step: str
) -> None:
    command = [PIPELINE_WORKER, "--nexum", server.address, "--query", QUERY, "--name", "first"]
    code, output = run_script(command, tmp_path, {"CRASH_AFTER": step}, forked=True)
    assert code in KILLED
    assert f"{step} is recorded; crashing now, as requested" in output
    upto = STEPS[: STEPS.index(step) + 1]
    (execution,) = pipelines(tmp_path, server.address)
    done = [(one, 1, "first", "COMPLETED") for one in upto]
    assert attempts(execution) == done
    if step != STEPS[-1]:
        assert attempts(finish(tmp_path, server)) == [
            *done,
            *((one, 1, "second", "COMPLETED") for one in STEPS[len(upto) :]),
        ]


def test_crash_during_kills_the_worker_between_effect_and_record(server: ServerThread, tmp_path: Path) -> None:
    log = tmp_path / "effects"
    command = [PIPELINE_WORKER, "--nexum", server.address, "--query", QUERY, "--name", "first", "--effects", str(log)]
    code, output = run_script(command, tmp_path, {"CRASH_DURING": "validate"}, forked=True)
    assert code in KILLED
    assert "validate has had its effect; crashing before its report, as requested" in output
    (execution,) = pipelines(tmp_path, server.address)
    assert f"(python -m nexum_engine show {execution['execution_id']} --nexum {server.address})" in output
    assert [node["status"] for node in execution["nodes"]][:2] == ["COMPLETED", "RUNNING"]
    effects = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(one["step"], one["attempt"]) for one in effects] == [("research", 1), ("validate", 1)]
    assert attempts(finish(tmp_path, server)) == [
        ("research", 1, "first", "COMPLETED"),
        ("validate", 1, "first", "LOST"),
        ("validate", 2, "second", "COMPLETED"),
        ("summarize", 1, "second", "COMPLETED"),
        ("report", 1, "second", "COMPLETED"),
    ]


def test_false_quote_in_recorded_research_is_dropped(server: ServerThread, tmp_path: Path) -> None:
    execution_id = start_pipeline(server.address)
    true = {"statement": "The Rust Foundation looks after Rust.", "url": RUST_PAGE, "quote": RUST_QUOTE}
    false = {"statement": "Rust is from 1921.", "url": RUST_PAGE, "quote": "Rust reached version 1.0 in May 1921."}
    record_research(server.address, execution_id, [false, true])
    execution = finish(tmp_path, server)
    validation = output_of(execution, "validate")
    assert [claim["quote"] for claim in validation["kept"]] == [RUST_QUOTE]
    assert [(one["claim"]["quote"], one["reason"]) for one in validation["dropped"]] == [
        (false["quote"], "the quote is not on the page")
    ]
    body, _, dropped = output_of(execution, "report")["markdown"].partition("## Dropped by validation")
    assert "1921" not in body
    assert "Rust is from 1921." in dropped


def test_failed_attempt_does_not_trigger_crash_after(server: ServerThread, tmp_path: Path) -> None:
    replies = [Reply(status=500)] * 3 + [Reply('{"claims": [], "note": "nothing found"}')]
    with OpenAIServer(replies) as model:
        env = {"OPENAI_BASE_URL": model.base_url, "NEXUM_MODEL": "m", "CRASH_AFTER": "research"}
        command = [PIPELINE_WORKER, "--nexum", server.address, "--query", QUERY]
        code, output = run_script(command, tmp_path, env, forked=True)
    assert code in KILLED
    # AutoGen's client tries three times before the attempt fails.
    assert output.index("failed   research") < output.index("research is recorded; crashing now, as requested")
    # This pipeline used a model. `pipelines` returns only offline pipelines.
    assert pipelines(tmp_path, server.address) == []


@pytest.mark.parametrize("variable", ["CRASH_AFTER", "CRASH_DURING"])
def test_an_unknown_step_is_a_usage_error(tmp_path: Path, variable: str) -> None:
    code, output = run_script([PIPELINE_WORKER], tmp_path, {variable: "publish"}, forked=True)
    assert code == 2
    assert f"error: {variable}=publish names no step; the steps are research, validate, summarize, report" in output


@pytest.mark.parametrize(
    ("arguments", "env", "told"),
    [
        (["--query", " "], {}, "the query is empty"),
        (["--nexum", "nowhere"], {}, "'nowhere' is not the address of a server"),
        ([], {"NEXUM_MODEL": "gpt-x"}, "NEXUM_MODEL=gpt-x needs OPENAI_API_KEY"),
    ],
)
def test_wrong_argument_is_a_one_line_error(
    tmp_path: Path, arguments: list[str], env: dict[str, str], told: str
) -> None:
    code, output = run_script([PIPELINE_WORKER, *arguments], tmp_path, env, forked=True)
    assert code == 2
    assert told in output


def test_offline_worker_ignores_wrong_model_settings(server: ServerThread, tmp_path: Path) -> None:
    start_pipeline(server.address)
    command = [PIPELINE_WORKER, "--nexum", server.address, "--offline"]
    code, output = run_script(command, tmp_path, {"NEXUM_MODEL": "gpt-x", "CRASH_AFTER": "report"}, forked=True)
    assert code in KILLED
    assert "Model: offline (requested)" in output


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to catch")
def test_stop_signal_ends_the_worker_normally(server: ServerThread, tmp_path: Path) -> None:
    with running([PIPELINE_WORKER, "--nexum", server.address], cwd=tmp_path) as worker:
        worker.wait_for("connected to")
        begun = time.monotonic()
        worker.terminate()
        assert worker.wait() == 0
        assert time.monotonic() - begun < 10  # the worker does not wait until its poll ends, which takes up to 20 s
