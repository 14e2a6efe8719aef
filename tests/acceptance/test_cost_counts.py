"""The cost of a durable call as counts, which don't depend on the speed of the machine. A count that rises is an error.

To print the present counts: python -m pytest -q -s tests/acceptance/test_cost_counts.py
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
from counted import Counts
from counting_proxy import counting_proxy
from harness import ROOT, running

ROUNDS, CALLS = 5, 10  # of each kind of call
TRIES = 3
COUNTED = str(ROOT / "tests" / "support" / "counted.py")
KINDS = ("tool call", "replayed call", "owned call", "recorded reply", "recorded tool call")
"""The last two kinds are the calls of an agent in a durable run."""

# For each count: its values for the KINDS, and then its margin in percent.
COSTS = {
    "RPCs": (0, 0, 0, 0, 0, 0),
    "messages": (4.1, 2, 4, 2, 2, 10),
    "statements": (12, 5, 12, 6, 6, 0),
    "commits": (2, 1, 2, 1, 1, 0),
    "WAL pages": (8.1, 0, 8.1, 4.1, 4.1, 6),
    "server's fsyncs": (2, 0, 2, 1, 1, 0),
    "server's loop turns": (14.6, 8, 16, 8, 8, 10),
    "server's loop callbacks": (21.4, 9, 18, 9, 9, 5),
    "worker's loop turns": (11.3, 0, 0, 0, 0, 12),
    "worker's loop callbacks": (14.2, 0, 0, 0, 0, 10),
    "client's fsyncs": (0, 0, 0, 0, 0, 0),
    "client's loop turns": (6, 5.8, 12, 8.3, 11, 10),
    "client's loop callbacks": (6, 6, 12, 9, 12, 8),
}


# With -D, the child of the test is the traced program and not strace. With --seccomp-bpf, strace stops the program only
# at these system calls.
STRACE = ("-D", "-f", "--seccomp-bpf", "-qq", "-e", "trace=fsync,fdatasync", "-e", "signal=none")


@cache
def strace() -> str | None:
    """Return the path of strace, if this machine has it and lets it trace."""
    path = shutil.which("strace")
    if path is None:
        return None
    probe = subprocess.run([path, *STRACE, "true"], capture_output=True, check=False)
    return path if probe.returncode == 0 and not probe.stderr else None


@contextmanager
def counted_server(folder: Path) -> Iterator[str]:
    """Run a server process whose work is counted; yield its address."""
    program, command = sys.executable, [COUNTED, str(folder / "server.counts"), "-m", "nexum_engine"]
    command += ["--listen", "127.0.0.1:0", "--database-url", f"sqlite:///{folder / 'nexum.db'}"]
    if tracer := strace():
        program, command = tracer, [*STRACE, "-o", str(folder / "server.fsyncs"), program, *command]
    with running(command, cwd=folder, program=program) as process:
        yield process.wait_for_address()


def measure(folder: Path) -> dict[str, list[float]]:
    """Return the counts of one call of each kind, by the name of the count."""
    folder.mkdir()
    programs = ROOT / "tests" / "programs"
    with counted_server(folder) as server, counting_proxy(server, Counts(folder / "wire.counts")) as address:
        worker = [COUNTED, str(folder / "worker.counts"), str(programs / "counting_worker.py"), address]
        with running(worker, cwd=folder) as worker_process:
            worker_process.wait_for("connected to")
            calls = [str(programs / "counted_calls.py"), address, str(folder), str(ROUNDS), str(CALLS)]
            with running([COUNTED, str(folder / "client.counts"), *calls], cwd=folder) as client:
                costs = json.loads(client.wait_for('{"tool call"', timeout=100))
    found = {name: [round(costs[kind][name], 1) for kind in KINDS] for name in costs[KINDS[0]]}
    if strace() is None:
        found["server's fsyncs"] = [*COSTS["server's fsyncs"][:-1]]  # without strace, use the expected values
    assert found.keys() == COSTS.keys()
    return found


def differences(counts: dict[str, list[float]], *, risen: bool) -> list[str]:
    """Return a line for each count that rose by more than its margin.

    Without `risen`, return a line for each count that fell by more than twice its margin.
    """
    found = []
    for name, (*limits, margin) in COSTS.items():
        for kind, limit, count in zip(KINDS, limits, counts[name], strict=True):
            if count > limit * (1 + margin / 100) if risen else count < limit * (1 - 2 * margin / 100):
                found.append(f"{name} of one {kind}: {count:g} instead of {limit:g}")
    return found


@pytest.mark.timeout(330)
def test_count_does_not_rise(tmp_path: Path) -> None:
    counts = measure(tmp_path / "0")
    for number in range(1, TRIES):
        if not differences(counts, risen=True):
            break
        # Measure again: a very busy machine adds to the counts, for instance when a poll's wait runs out.
        again = measure(tmp_path / str(number))
        counts = {name: list(map(min, counts[name], again[name])) for name in counts}
    rows = [
        f'    "{name}": ({", ".join(f"{count:g}" for count in (*counts[name], COSTS[name][-1]))}),' for name in COSTS
    ]
    print("", "measured now:", "COSTS = {", *rows, "}", sep="\n")
    if fallen := differences(counts, risen=False):
        warnings.warn(
            f"calls cost less than COSTS says: {'; '.join(fallen)}. Replace COSTS in "
            "tests/acceptance/test_cost_counts.py by the table that pytest -s prints",
            stacklevel=1,
        )
    risen = "; ".join(differences(counts, risen=True))
    assert not risen, f"calls cost more: {risen}. If that is worth it, replace COSTS by the table printed below"
