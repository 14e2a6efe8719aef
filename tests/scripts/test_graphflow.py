"""crash_demo.py --graphflow and --cyclic with the installed AutoGen, and with a repaired copy of AutoGen."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import autogen_agentchat
import pytest
from harness import ROOT
from processes import run_script
from server_thread import ServerThread

DEMO = str(ROOT / "crash_demo.py")
REPAIRS = (
    ('"ready": list(self._ready),', '"ready": [*self._active_speakers, *self._ready], "groups": self._groups(),'),
    (
        'self._ready = deque(state["ready"])',
        'self._ready = deque(state["ready"])\n'
        '        self._triggered_activation_groups = {n: set(g) for n, g in state["groups"].items()}',
    ),
    (
        "    async def load_state(self,",
        "    def _groups(self) -> Dict[str, List[str]]:\n"
        "        return {n: list(g) for n, g in self._triggered_activation_groups.items()}\n\n"
        "    async def load_state(self,",
    ),
)


@pytest.fixture
def fixed(tmp_path: Path) -> Path:
    """A folder for PYTHONPATH, with a repaired copy of AutoGen."""
    folder = tmp_path / "fixed"
    package = Path(autogen_agentchat.__file__).parent
    # Copy the compiled modules, too: otherwise, each process would compile AutoGen.
    shutil.copytree(package, folder / "autogen_agentchat")
    file = folder / "autogen_agentchat/teams/_group_chat/_graph/_digraph_group_chat.py"
    text = file.read_text(encoding="utf-8")
    for found, repair in REPAIRS:
        assert text.count(found) == 1, f"AutoGen has changed: {found}"
        text = text.replace(found, repair)
    file.write_text(text, encoding="utf-8")
    return folder


def show(server: ServerThread, folder: Path, *arguments: str, env: dict[str, str] | None = None) -> str:
    code, output = run_script([DEMO, "--offline", "--nexum", server.address, *arguments], folder, env, forked=True)
    assert code == 0, output
    return output


@pytest.mark.timeout(240)
def test_interrupted_graph_does_not_resume_and_the_durable_run_finishes(server: ServerThread, tmp_path: Path) -> None:
    output = show(server, tmp_path, "--graphflow")
    assert "no agent called its model; ended normally" in output
    assert "the team did not resume: analyst, editor, publisher never spoke" in output
    assert "model calls by researcher, analyst; killed" in output
    assert "recorded by then: reply 1 of researcher\n" in output
    assert "model calls by analyst, editor, publisher; ended normally" in output
    assert "1 recorded call(s) were replayed, none was repeated; 3 were made live" in output


def test_stopped_loop_does_not_reach_its_exit_and_the_durable_run_finishes(
    server: ServerThread, tmp_path: Path
) -> None:
    output = show(server, tmp_path, "--cyclic")
    assert "model calls by planner, author, reviewer; ended normally" in output
    assert "model calls by author, reviewer; ended normally" in output
    assert "AutoGen reports: 'Digraph execution is complete'" in output
    assert "the team did not resume: publisher never spoke" in output
    assert "3 recorded call(s) were replayed, none was repeated; 5 were made live" in output


@pytest.mark.timeout(240)
@pytest.mark.parametrize("kind", ["--graphflow", "--cyclic"])
def test_fixed_autogen_resumes(server: ServerThread, tmp_path: Path, fixed: Path, kind: str) -> None:
    output = show(server, tmp_path, kind, env={"PYTHONPATH": f"{ROOT}{os.pathsep}{fixed}"})
    assert "[plain] the team resumed: after loading," in output
    assert "did not resume" not in output
    assert "none was repeated" in output
