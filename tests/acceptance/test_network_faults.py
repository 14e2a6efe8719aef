"""No call is lost or changed, although connections break, are slow, or stall in one direction.

A proxy stands between the caller and the server, between the worker and the server and, on PostgreSQL, between the
server and the database. Each kind of fault hits each connection once. NETWORK_FAULTS=200 makes more and longer faults,
which takes ten minutes.
"""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from faulty_proxy import FaultyProxy, postgres_proxy
from harness import nexum_server
from processes import Acknowledged, assert_recorded_once, counting_worker, recorded, submitter, wait_until
from proxy import DIRECTIONS, TO_CLIENT, TO_SERVER

SEED = int(os.environ.get("NETWORK_SEED") or 4519)
FAULTS = int(os.environ.get("NETWORK_FAULTS") or 0)
LONGEST = 2.0 if FAULTS else 0.8
"""The longest fault in seconds: shorter than most time limits. A server may wait for a lost worker for less time."""
CALLS_PER_FAULT = 3
CALLERS = 4
"""The number of calls that the caller makes at a time."""
KINDS: dict[str, Callable[[FaultyProxy], None]] = {
    "break": FaultyProxy.break_connections,
    "hold to the server": lambda proxy: proxy.hold(TO_SERVER),
    "hold to the client": lambda proxy: proxy.hold(TO_CLIENT),
    "partition": lambda proxy: proxy.hold(*DIRECTIONS),
    "delay": lambda proxy: proxy.delay(0.2),
}


def disturb(proxy: FaultyProxy, kind: str, gates: list[Path], what: str, choose: random.Random) -> None:
    """Let calls begin, each when its gate (a file) exists, and cause a fault. End the fault when it has hit."""
    wait_until(lambda: proxy.is_used, f"{what} is open")
    before = proxy.hits
    for gate in gates[:-1]:
        gate.touch()
    time.sleep(choose.uniform(0, 0.06))
    KINDS[kind](proxy)
    # During the fault, let one more call begin to run, so that each connection carries data in both directions.
    gates[-1].touch()
    wait_until(lambda: proxy.hits > before, f"{what} is hit")
    time.sleep(choose.uniform(0, LONGEST))
    proxy.release()


@pytest.mark.both_stores
@pytest.mark.timeout(240 + 10 * FAULTS)
def test_faults_of_connections_neither_lose_nor_change_nor_repeat_results(tmp_path: Path, database_url: str) -> None:
    print(f"NETWORK_SEED={SEED}")
    choose = random.Random(SEED)
    connections = ["caller", "worker"]
    if database_url.startswith("postgresql"):
        connections.append("database")
    combinations = [(name, kind) for kind in KINDS for name in connections]
    choose.shuffle(combinations)
    faults = list(itertools.islice(itertools.cycle(combinations), FAULTS or len(combinations)))
    # The caller must have another call to make after the last fault has begun.
    log, count = tmp_path / "log", len(faults) * CALLS_PER_FAULT + CALLERS
    gates = [tmp_path / f"gate-{number}" for number in range(count)]
    calls = [{"log": str(log), "gate": str(gate), "number": number} for number, gate in enumerate(gates)]
    acknowledged = Acknowledged()

    with ExitStack() as stack:
        proxies = {}
        if "database" in connections:
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
        for number, (name, kind) in enumerate(faults):
            opened = gates[number * CALLS_PER_FAULT : (number + 1) * CALLS_PER_FAULT]
            disturb(proxies[name], kind, opened, f"{kind}: the connection of the {name}", choose)
        for gate in gates[-CALLERS:]:
            gate.touch()
        assert caller.wait(120) == 0, caller.output
        acknowledged.read(caller)
        records = recorded(tmp_path, server.address)

    assert_recorded_once(records, acknowledged, log, count, {"LOST", "INTERRUPTED", "EXPIRED"})
