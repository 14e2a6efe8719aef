"""No call is lost or changed, although connections break, are slow, or stall in one direction.

A proxy stands between the caller and the server, between the worker and the server and, on PostgreSQL, between the
server and the database. NETWORK_FAULTS=200 takes ten minutes.
"""

from __future__ import annotations

import os
import random
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from faulty_proxy import FaultyProxy, postgres_proxy
from harness import nexum_server
from processes import Acknowledged, assert_recorded_once, counting_worker, recorded, submitter, wait_until
from proxy import DIRECTIONS, TO_CLIENT, TO_SERVER

SEED = int(os.environ.get("NETWORK_SEED") or 4519)
FAULTS = int(os.environ.get("NETWORK_FAULTS") or 8)
CALLS_PER_FAULT = 3
KINDS: dict[str, Callable[[FaultyProxy], None]] = {
    "break": FaultyProxy.break_connections,
    "hold to the server": lambda proxy: proxy.hold(TO_SERVER),
    "hold to the client": lambda proxy: proxy.hold(TO_CLIENT),
    "partition": lambda proxy: proxy.hold(*DIRECTIONS),
    "delay": lambda proxy: proxy.delay(0.2),
}


@pytest.mark.both_stores
@pytest.mark.timeout(120 + 10 * FAULTS)
def test_faults_of_connections_neither_lose_nor_change_nor_repeat_results(tmp_path: Path, database_url: str) -> None:
    print(f"NETWORK_SEED={SEED}")
    choose = random.Random(SEED)
    log, count = tmp_path / "log", FAULTS * CALLS_PER_FAULT
    gates = [tmp_path / f"gate-{number}" for number in range(count)]
    calls = [{"log": str(log), "gate": str(gate), "number": number} for number, gate in enumerate(gates)]
    acknowledged = Acknowledged()
    fired: dict[str, int] = defaultdict(int)

    with ExitStack() as stack:
        proxies = {}
        if database_url.startswith("postgresql"):
            proxies["database"], url = postgres_proxy(database_url)
            stack.enter_context(proxies["database"])
            database_url = url.format(port=proxies["database"].port)
        server = stack.enter_context(nexum_server(tmp_path, database_url=database_url))
        for name in ("caller", "worker"):
            proxies[name] = stack.enter_context(FaultyProxy(server.address))
        stack.enter_context(counting_worker(tmp_path, proxies["worker"].address))
        caller = stack.enter_context(
            submitter(tmp_path, proxies["caller"].address, "count_behind_gate", *calls, timeout=120)
        )
        wait_until(lambda: all(proxy.is_used for proxy in proxies.values()), "all parts are connected")
        # Each kind of fault hits each connection in turn.
        faults = [(name, kind) for kind in KINDS for name in proxies]
        choose.shuffle(faults)
        for number in range(FAULTS):
            name, kind = faults[number % len(faults)]
            proxy = proxies[name]
            before = proxy.broken + proxy.held
            for gate in gates[number * CALLS_PER_FAULT : (number + 1) * CALLS_PER_FAULT]:
                gate.touch()
            time.sleep(choose.uniform(0, 0.06))
            KINDS[kind](proxy)
            # The fault ends within 2 s, before most time limits. The server may wait for a lost worker for less time.
            time.sleep(choose.uniform(0.2, 2.0))
            proxy.release()
            fired[kind] += proxy.broken + proxy.held - before
        assert caller.wait(120) == 0, caller.output
        acknowledged.read(caller)
        records = recorded(tmp_path, server.address)

    assert all(fired.values()), f"a kind of fault hit nothing: {dict(fired)}"
    assert_recorded_once(records, acknowledged, log, count, {"LOST", "INTERRUPTED", "EXPIRED"})
