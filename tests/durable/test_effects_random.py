"""Random programs with budgets and tools of every policy; kills and decisions are random. See tests/effect_runs.py."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from effect_runs import run_programs

PROGRAMS = 5
DEATHS = 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the programs are forked")
async def test_killed_programs_have_no_effect_twice_none_unapproved_and_none_beyond_the_budget(tmp_path: Path) -> None:
    first = random.randrange(1_000_000)
    problems, hits = await run_programs(tmp_path, list(range(first, first + PROGRAMS)), max_deaths=DEATHS)
    assert not problems
    assert hits["killed"] > 0
