"""demo.py --ask: a person decides about each page, also while the demo is dead."""

from __future__ import annotations

import re
from pathlib import Path

from processes import QUESTION, call_of, demo, recorded, run_demo, run_script

from workflow import OFFLINE_TOOL_CALL

WAITING = re.compile(r"waiting for a decision on visit_webpage\((.*?)\) .* approve (exec-[0-9]+-[0-9a-f]+)")


def test_killed_demo_continues_with_the_decisions_that_were_made_meanwhile(tmp_path: Path) -> None:
    with demo(tmp_path, "--ask", QUESTION) as killed:
        lines = [killed.wait_for("waiting for a decision on visit_webpage") for _ in range(2)]
        killed.kill()
    asked = {match[1]: match[2] for match in map(WAITING.search, lines) if match}
    (tokyo,) = (execution for page, execution in asked.items() if "tokyo" in page)
    (new_york,) = (execution for page, execution in asked.items() if "new-york" in page)
    for decision in (["approve", tokyo], ["reject", new_york, "--by", "ann", "--reason", "not this one"]):
        code, output = run_script(["-m", "nexum_engine", *decision], tmp_path, forked=True)
        assert code == 0, output
    code, output = run_demo(tmp_path, "--ask", QUESTION)
    assert code == 0, output
    assert "waiting for a decision" not in output
    assert "[agent] visit_webpage failed: ann rejected this call: not this one" in output
    assert "Tool calls: 1 executed, 2 cached, 0 attached, 1 failed" in output
    calls = [call_of(one) for one in recorded(tmp_path) if one["workflow_id"] == OFFLINE_TOOL_CALL.workflow_id]
    visited = [arguments["url"] for name, arguments in calls if name == "visit_webpage"]
    assert ["tokyo" in url for url in visited] == [True]
