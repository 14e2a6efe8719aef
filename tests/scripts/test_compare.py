"""benchmarks/compare.py runs although its peers are not installed, and leaves no process behind."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
from harness import ROOT, Process

OWN = ("autogen", "nexum-owner", "nexum-session", "nexum-worker")


def compare(folder: Path, *options: str) -> Process:
    return Process([str(ROOT / "benchmarks" / "compare.py"), "--quick", "--folder", str(folder), *options], cwd=folder)


def left_behind(folder: Path) -> list[int]:
    """Return the ids of the processes whose environment names the folder. They are found only on Linux."""
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            if b"COMPARE_FOLDER=" + bytes(folder) in environ.read_bytes():
                found.append(int(environ.parent.name))
        except OSError:  # the process ended, or belongs to another user
            continue
    return found


@pytest.mark.timeout(240)
def test_own_rows_are_measured_and_missing_peers_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from peers import ALL

    missing = {peer.name: peer.missing() for peer in ALL if peer.missing() is not None}
    only = [option for name in (*OWN, *missing) for option in ("--only", name)]
    found, chart = tmp_path / "found.json", tmp_path / "chart.svg"
    done = compare(tmp_path, *only, "--json", str(found), "--chart", str(chart))
    assert done.wait() == 0, done.output
    for name, install in missing.items():
        assert f"skipped: {name}: not installed: {install}" in done.output
    rows = {row["name"]: row for row in json.loads(found.read_text())["rows"]}
    assert tuple(rows) == OWN
    for name, row in rows.items():
        assert row["p50_in_commits"] > 0, row
        assert row["calls_per_second"] > 0, row
        # Not every machine has strace, and some machines don't allow it.
        expected = {"autogen": "nothing", "nexum-worker": "request, result"}.get(name, "result")
        assert row["on_disk"] in (expected, "not checked"), row
        assert row["replayed"] == (None if name == "autogen" else 20), row
    assert rows["nexum-worker"]["recovery_ms"] > 0
    titles = "".join(text for text in ElementTree.parse(chart).getroot().itertext())
    assert all(row["title"] in titles for row in rows.values())
    assert left_behind(tmp_path) == []


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize("end", ["interrupt", "kill"])
def test_no_process_outlives_the_benchmark(tmp_path: Path, end: str) -> None:
    running = compare(tmp_path, "--only", "nexum-worker")
    running.wait_for("round 1 of 1")
    deadline = time.monotonic() + 30
    while len(left_behind(tmp_path)) < 4:  # a guard, the server, a worker, a caller
        assert time.monotonic() < deadline, running.output
        time.sleep(0.01)
    getattr(running, end)()
    code = running.wait()
    assert "Traceback" not in running.output
    if end == "interrupt":
        assert code == 130
    while left_behind(tmp_path):
        assert time.monotonic() < deadline + 30
        time.sleep(0.01)
