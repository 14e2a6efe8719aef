"""Measure how long the demos take from the command line to their first result, beside `python -c pass`.

    python benchmarks/start_up.py
    python benchmarks/start_up.py --beside ../other-checkout      # interleaved with another version of this project
    python benchmarks/start_up.py --json

Each run is a new process in a new folder, offline, so it starts its own server and workers. The table shows how long a
run takes until certain lines of its output, and until its end. The CPU time counts all processes of the run. On a busy
machine, the CPU time is more reliable than the other times. To compare machines, compare the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

from floor import ROOT, compile_modules, machine, machine_text

sys.path.insert(0, str(ROOT))

from nexum_engine.options import count

END, CPU = "end", "CPU time"
PASS = "python -c pass"
CASES: dict[str, tuple[list[str], dict[str, str]]] = {
    # For each case: the command, and the moments to measure. A moment is a line of output that contains this text.
    "demo.py --help": (["demo.py", "--help"], {}),
    "demo.py": (["demo.py", "--offline", "--new-session"], {"first tool executed": " done ✓"}),
    "crash_demo.py": (["crash_demo.py", "--offline"], {"first step recorded": "research   recorded"}),
}


def run(command: list[str], moments: dict[str, str]) -> dict[str, float]:
    """Run Python with this command; return the seconds until each moment, and until the end."""
    seconds: dict[str, float] = {}
    named = {name: value for name, value in os.environ.items() if name not in ("NEXUM_ADDRESS", "DATABASE_URL")}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        begun, cpu_begun = time.perf_counter(), _cpu_of_children()
        with subprocess.Popen(
            [sys.executable, *command],
            cwd=folder,
            env={**named, "PYTHONUTF8": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
        ) as process:
            assert process.stdout is not None
            output = []
            for line in process.stdout:
                output.append(line)
                for moment, text in moments.items():
                    if text in line:
                        seconds.setdefault(moment, time.perf_counter() - begun)
        seconds[END] = time.perf_counter() - begun
        seconds[CPU] = _cpu_of_children() - cpu_begun
    if process.returncode != 0 or not moments.keys() <= seconds.keys():
        raise SystemExit(f"error: {' '.join(command)} failed (exit {process.returncode}):\n{''.join(output)}")
    return seconds


def _cpu_of_children() -> float:
    """Return the CPU seconds of all child processes that have ended; 0 on Windows."""
    times = os.times()
    return times.children_user + times.children_system


def measure(rounds: int, versions: list[Path]) -> dict[str, Any]:
    """Let the cases and the versions take turns; return the median of each time."""
    found: dict[str, list[float]] = defaultdict(list)
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        for moment, seconds in run(["-c", "pass"], {}).items():
            found[f"{PASS}: {moment}"].append(seconds)
        for case, (command, moments) in CASES.items():
            for version in versions:
                at = f" ({version.name})" if len(versions) > 1 else ""
                for moment, seconds in run([str(version / command[0]), *command[1:]], moments).items():
                    found[f"{case}{at}: {moment}"].append(seconds)
    return {
        **machine(),
        "rounds": rounds,
        "seconds": {name: round(median(seconds), 3) for name, seconds in found.items()},
    }


def table(found: dict[str, Any]) -> str:
    """Return the figures as a text table."""
    medians = found["seconds"]
    width = max(map(len, medians))
    lines = [f"{'':<{width}}{'seconds':>10}{'times ' + PASS:>24}"]
    for name, seconds in medians.items():
        unit = medians[f"{PASS}: {CPU if name.endswith(CPU) else END}"]
        lines.append(f"{name:<{width}}{seconds:>10.3f}{f'{seconds / unit:.0f}' if unit else '':>24}")
    lines += ["", f"{found['rounds']} rounds, medians; {machine_text(found)}"]
    return "\n".join(lines)


def main() -> int:
    """Run the benchmark from the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=count(), default=5, help="runs of each case (default: %(default)s)")
    parser.add_argument("--beside", type=Path, metavar="FOLDER", help="measure this version of the project, too")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    versions = [ROOT, *([args.beside.resolve()] if args.beside else [])]
    for version in versions:
        compile_modules(version)
    found = measure(args.rounds, versions)
    print(json.dumps(found, indent=2, ensure_ascii=False) if args.json else table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
