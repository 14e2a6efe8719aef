"""AutoGen's own tests have the same outcomes without a session, in a live durable session, and in its replay.

AutoGen's tests are downloaded with its source distribution. If the package index can't be reached, the test is skipped.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from harness import MACHINES_CERTIFICATES, ROOT, run_to_end, trusting
from server_thread import ServerThread

SUITE = str(ROOT / "tests" / "support" / "autogen_suite.py")
FILES = (
    "test_group_chat_graph",
    "test_society_of_mind_agent",
    "test_task_runner_tool",
    "test_termination_condition",
    "test_userproxy_agent",
)


@pytest.fixture(scope="module")
def autogen_tests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Download the tests of the installed version of AgentChat; return their folder."""
    folder = tmp_path_factory.mktemp("autogen")
    version = importlib.metadata.version("autogen-agentchat")
    # Without build isolation, pip doesn't install hatchling, which reads the version, into an environment of its own.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
    with trusting(MACHINES_CERTIFICATES):
        done = subprocess.run(
            [*command, "--no-binary", ":all:", f"autogen-agentchat=={version}"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
    archives = list(folder.glob("*.tar.gz"))
    if not archives:
        pytest.skip(f"the package index did not give AutoGen's source distribution: {done.stderr.strip()[-200:]}")
    with tarfile.open(archives[0]) as archive:
        # Choose the filter that Python 3.14 uses by default. Early releases of 3.10 and 3.11 have no filters.
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))  # type: ignore[arg-type]
    (found,) = folder.glob("*/tests")
    return found


def outcomes(tests: Path, more: Mapping[str, str]) -> tuple[dict[str, str], int]:
    """Return each test's outcome by its name, and the number of live model calls."""
    files = [str(tests / f"{name}.py") for name in FILES]
    options = ["-q", "-rA", "-p", "no:cacheprovider", "-o", "asyncio_mode=auto", "--timeout", "60"]
    # The first run shows what AutoGen does where durable_autogen isn't even imported. So it has a new interpreter.
    done = run_to_end([SUITE, *options, *files], cwd=tests.parent, env=more, forked="SESSIONS" in more)
    found = {
        name: outcome for outcome, name in re.findall(r"^(PASSED|FAILED|ERROR) \S*::(\S+)", done.stdout, re.MULTILINE)
    }
    asked = re.search(r"asked live: (\d+)", done.stdout)
    assert asked is not None, done.stdout + done.stderr
    return found, int(asked[1])


@pytest.mark.timeout(400)
def test_autogen_suite_has_same_outcomes_in_session_and_replay(server: ServerThread, autogen_tests: Path) -> None:
    plain, asked = outcomes(autogen_tests, {})
    assert (len(plain) > 100, asked > 50) == (True, True)
    inside = {"NEXUM_ADDRESS": server.address, "SESSIONS": "suite"}
    live, asked_live = outcomes(autogen_tests, inside)
    assert {name: outcome for name, outcome in live.items() if plain[name] != outcome} == {}
    assert asked_live == asked
    replayed, asked_again = outcomes(autogen_tests, inside)
    assert {name: outcome for name, outcome in replayed.items() if plain[name] != outcome} == {}
    assert asked_again == 0
