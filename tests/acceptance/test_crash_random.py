"""SIGKILLs of server, worker and caller at random moments of calls. CRASH_KILLS=500 takes ten minutes."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path

import pytest
from harness import Process, nexum_server
from processes import attempts, call_of, counting_worker, effects, recorded, result_of, submitter

from submit_task import call_key

SEED = int(os.environ.get("CRASH_SEED") or 8672)
KILLS = int(os.environ.get("CRASH_KILLS") or 20)
CALLS = 2 * KILLS
RESULT = re.compile(r"RESULT ((\d+) [0-9a-f-]{36})")


class Acknowledged:
    """The results that callers got, by the call's number. A number must never get two results."""

    def __init__(self) -> None:
        self.results: dict[int, str] = {}

    def read(self, caller: Process) -> None:
        for line in caller.lines:
            if match := RESULT.fullmatch(line):
                number, result = int(match[2]), match[1]
                assert self.results.setdefault(number, result) == result


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
            assert process.popen.returncode == -signal.SIGKILL
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
    # Every call has one COMPLETED execution, with the result that its callers got.
    assert {one["status"] for one in records} == {"COMPLETED"}
    by_number = {call_of(one)[1]["number"]: one for one in records}
    assert len(records) == len(by_number) == CALLS
    assert acknowledged.results == {number: result_of(one) for number, one in by_number.items()}
    # No effect happened after its result was recorded. A call was attempted again only after an attempt was lost.
    log_of = defaultdict(list)
    for effect in effects(log):
        log_of[effect.key].append(effect)
    assert len(log_of) == CALLS
    for one in records:
        (key,) = [key for key in log_of if call_key(*call_of(one)) in key]
        outcomes = [attempt["outcome"] for attempt in attempts(one)]
        assert outcomes[-1] == "COMPLETED"
        assert set(outcomes[:-1]) <= {"LOST", "INTERRUPTED"}
        assert len({effect.attempt for effect in log_of[key]}) == len(log_of[key])
        assert max(effect.at_ms for effect in log_of[key]) <= one["ended_ms"]
