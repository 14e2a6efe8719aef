"""The PostgreSQL under two servers fails over to its replica during calls: no acknowledged result is lost."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from harness import nexum_server
from processes import Acknowledged, assert_recorded_once, counting_worker, effects, recorded, submitter, wait_until

CALLS = 60


@pytest.mark.skipif(sys.platform == "win32", reason="the test kills a group of processes, which Windows doesn't have")
@pytest.mark.usefixtures("postgres")  # skips the test if PostgreSQL isn't installed; the test starts its own pair
def test_failover_to_a_replica_loses_and_changes_nothing(tmp_path: Path) -> None:
    from replicated_postgres import replicated_postgres

    log, acknowledged = tmp_path / "log", Acknowledged()
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

        gates[0].touch()
        wait_until(lambda: len(effects(log)) >= CALLS // 4, "a quarter of the calls has run")
        primary.kill()
        assert len(effects(log)) < CALLS // 2, "all calls of the first half ran before the primary was killed"
        gates[1].touch()
        replica.execute("SELECT pg_promote()")
        assert caller.wait(120) == 0, caller.output
        assert replica.execute("SELECT pg_is_in_recovery()") is False
        acknowledged.read(caller)
        records = recorded(tmp_path, servers[0].address)

    assert_recorded_once(records, acknowledged, log, CALLS, {"LOST", "INTERRUPTED", "EXPIRED"})
