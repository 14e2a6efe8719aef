"""A process that the tests fork ends as any Python does."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import run_to_end

PROGRAM = """
import asyncio

class Failing:
    def __del__(self):
        raise ValueError("at the end")

async def leave_a_task():
    global task
    task = asyncio.create_task(asyncio.sleep(60))
    await asyncio.sleep(0)

kept = Failing()
loop = asyncio.new_event_loop()
loop.run_until_complete(leave_a_task())
unawaited = leave_a_task()
print("end")
"""


@pytest.mark.parametrize("forked", [False, True])
def test_process_reports_at_its_end_what_its_program_has_left(tmp_path: Path, forked: bool) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    done = run_to_end(["program.py"], cwd=tmp_path, forked=forked)
    assert (done.returncode, done.stdout) == (0, "end\n")
    assert "ValueError: at the end" in done.stderr
    assert "Task was destroyed but it is pending!" in done.stderr
    assert "coroutine 'leave_a_task' was never awaited" in done.stderr
