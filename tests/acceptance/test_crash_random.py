"""SIGKILLs of server, worker and caller at random moments of calls. CRASH_KILLS=500 takes ten minutes."""

from __future__ import annotations

import os
import random
import time
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path

import pytest
from harness import KILLED, Process, nexum_server
from processes import Acknowledged, assert_recorded_once, counting_worker, recorded, submitter

SEED = int(os.environ.get("CRASH_SEED") or 8672)
KILLS = int(os.environ.get("CRASH_KILLS") or 12)
CALLS = 2 * KILLS


@pytest.mark.timeout(120 + 5 * KILLS)
@pytest.mark.usefixtures("loop_of_processes")
def test_random_kills_neither_lose_nor_change_nor_repeat_recorded_results(tmp_path: Path) -> None:
    print(f"CRASH_SEED={SEED}")
    choose = random.Random(SEED)
    log = tmp_path / "log"
    gates = [tmp_path / f"gate-{number}" for number in range(CALLS)]
    calls = [{"log": str(log), "gate": str(gate), "number": number} for number, gate in enumerate(gates)]
    acknowledged = Acknowledged()
    killed: dict[str, int] = defaultdict(int)

    with ExitStack() as stack:
        server = stack.enter_context(nexum_server(tmp_path))
        address = server.address
        workers = [stack.enter_context(counting_worker(tmp_path, address)) for _ in range(2)]

        def start_caller() -> Process:
            return stack.enter_context(submitter(tmp_path, address, "count_behind_gate", *calls, timeout=60))

        caller = start_caller()
        for kill in range(KILLS):
            # Let two calls run, which takes 40 ms, and kill a process at a random moment.
            for gate in gates[2 * kill : 2 * kill + 2]:
                gate.touch()
            time.sleep(choose.uniform(0, 0.06))
            victim = choose.choice(["server", "worker", "caller"])
            if victim == "server":
                process = server.process
            elif victim == "worker":
                process = workers.pop(choose.randrange(len(workers)))
            else:
                process = caller
            assert process.popen.poll() is None, f"kill {kill}: the {victim} had ended\n{process.output}"
            process.kill()
            assert process.popen.returncode in KILLED
            killed[victim] += 1
            if victim == "server":
                server = stack.enter_context(nexum_server(tmp_path, port=server.port))
            elif victim == "worker":
                workers.append(stack.enter_context(counting_worker(tmp_path, address)))
            else:
                caller.wait()
                acknowledged.read(caller)
                caller = start_caller()
        assert caller.wait(90) == 0, caller.output
        acknowledged.read(caller)
        records = recorded(tmp_path, address)

    assert sum(killed.values()) == KILLS
    assert_recorded_once(records, acknowledged, log, CALLS, {"LOST", "INTERRUPTED"})
