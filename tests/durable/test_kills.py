"""Durable runs of every shape of team, killed with SIGKILL at random moments until they finish."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from durable_runs import MAX_KILLS, SHAPES, Bench, bench, run_killed
from harness import ROOT

RUNS = 1
MAX_RUNS = 20


@pytest.fixture(scope="module")
def killing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with bench(Path(tmp_path_factory.mktemp("durable"))) as found:
        yield found


@pytest.mark.timeout(400)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the programs are forked")
@pytest.mark.parametrize("shape", SHAPES)
def test_killed_run_resumes_to_same_result(killing: Bench, shape: str) -> None:
    kill_runs(killing, shape)


@pytest.mark.timeout(400)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the programs are forked")
def test_killed_run_without_a_server_resumes_to_same_result(tmp_path: Path) -> None:
    with bench(tmp_path, without_server=True) as found:
        kill_runs(found, "fan_out")


def kill_runs(killing: Bench, shape: str) -> None:
    hit = 0
    for number in range(MAX_RUNS):
        options = ["--stream"] if number % 3 == 2 else []
        session = f"{shape.replace('_', '-')}-{number}"
        verdict = run_killed(killing, shape, session, random.randint(2, MAX_KILLS), *options)
        assert not verdict.problems
        hit += verdict.kills > 0  # a run that ended before its kill shows nothing
        if hit == RUNS:
            return
    raise AssertionError(f"only {hit} of {MAX_RUNS} runs were hit")


@pytest.mark.parametrize(
    ("script", "option"),
    [
        ("tests/durable_runs.py", "--long"),
        ("tests/effect_runs.py", "--programs"),
        ("benchmarks/tool_call.py", "--calls"),
        ("benchmarks/durable_run.py", "--only"),
        ("benchmarks/start_up.py", "--beside"),
        ("benchmarks/compare.py", "--only"),
    ],
)
def test_script_for_developers_starts_in_any_folder(tmp_path: Path, script: str, option: str) -> None:
    command = [sys.executable, str(ROOT / script), "--help"]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert option in done.stdout
