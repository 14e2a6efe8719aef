"""The timeline as a page: its contents, its security policy, and its layout in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from pipelines import BEGUN_MS, ONE, TWO, Try, attempts, made_run, pipelines, recorded_outputs, run_crash_demo
from server_thread import ServerThread

from crash_demo import finish
from nexum_engine.records import Outcome
from support.pipeline.evidence import CrashPoint, PipelineRun
from support.pipeline.page import page

DEAD = replace(ONE, death="killed by SIGKILL", recorded=recorded_outputs("research", "validate"))
TRIES = [
    Try("research", "worker-1", 100, 600),
    Try("validate", "worker-1", 600, 700),
    Try("summarize", "worker-1", 700, 1900, Outcome.LOST),
    Try("summarize", "worker-2", 2100, 2105),
    Try("report", "worker-2", 2110, 2200),
]
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None
)
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed here: apt-get install chromium")


def made(query: str = "What is so?") -> PipelineRun:
    return made_run(TRIES, [DEAD, TWO], CrashPoint("summarize", within=True), query=query)


def test_page_and_verdicts_name_the_source_of_the_times(capsys: pytest.CaptureFixture[str]) -> None:
    run = replace(made(), source="the workers' own log")
    assert "with its times from\nthe workers' own log." in page([run])
    finish([run, run], None, None)
    assert "2 crash points, from the workers' own log:" in capsys.readouterr().out


class _Elements(HTMLParser):
    """A parser that keeps every element with its attributes, and checks that end tags match."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "br"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, self.getpos()

    def close(self) -> None:
        super().close()
        assert self._open == []


def elements(document: str) -> list[tuple[str, dict[str, str | None]]]:
    parser = _Elements()
    parser.feed(document)
    parser.close()
    return parser.found


def having(document: str, attribute: str, kind: str) -> list[dict[str, str | None]]:
    return [
        attrs for _, attrs in elements(document) if kind in str(attrs.get("class") or "").split() and attribute in attrs
    ]


# ---- Its text --------------------------------------------------------------------------------------------------------


def test_page_has_a_bar_for_each_attempt_and_a_line_for_each_death() -> None:
    document = page([made()])
    bars = having(document, "data-step", "bar")
    assert [(bar["data-step"], bar["data-attempt"], bar["data-outcome"]) for bar in bars] == [
        ("research", "1", "COMPLETED"),
        ("validate", "1", "COMPLETED"),
        ("summarize", "1", "LOST"),
        ("summarize", "2", "COMPLETED"),
        ("report", "1", "COMPLETED"),
    ]
    assert [int(bar["data-start-ms"] or 0) - BEGUN_MS for bar in bars] == [one.start for one in TRIES]
    assert [int(bar["data-end-ms"] or 0) - BEGUN_MS for bar in bars] == [one.end for one in TRIES]
    assert [lane["data-worker"] for lane in having(document, "data-worker", "lane")] == ["worker-1", "worker-2"]
    (crash,) = having(document, "data-at-ms", "crash")
    assert (crash["data-worker"], int(crash["data-at-ms"] or 0) - BEGUN_MS) == ("worker-1", 1900)
    assert "Ran again: summarize" in document


def test_several_runs_are_several_sections() -> None:
    sections = [attrs for tag, attrs in elements(page([made(), made()])) if tag == "section"]
    assert [one["data-point"] for one in sections] == ["during summarize"] * 2


def test_record_text_is_escaped() -> None:
    evil = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;"
    run = made(evil)
    nodes = [
        replace(node, output_json=json.dumps({"markdown": evil})) if node.node_id == "report" else node
        for node in run.execution.nodes
    ]
    run = replace(run, execution=replace(run.execution, nodes=tuple(nodes), execution_id=evil))
    tags = {tag for tag, _ in elements(page([run]))}
    assert not tags & {"script", "img", "link", "iframe", "object", "form", "a"}
    assert unescape(page([run])).count("<script>alert(1)</script>") == 4  # the id twice, the query, the report


def test_page_loads_nothing_and_forbids_loading() -> None:
    document = page([made()])
    assert not re.search(r"https?://|url\(|@import|\bsrc=|\bhref=", document.replace("default-src", ""))
    policy = [attrs for tag, attrs in elements(document) if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert [one["content"] for one in policy] == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_failed_run_is_marked_as_failed() -> None:
    run = made_run(TRIES, [ONE, TWO], CrashPoint("validate"))
    assert "Failed: worker-1 did not die" in page([run])
    assert having(page([run]), "class", "bad")


def test_page_of_the_demo_shows_the_servers_records(server: ServerThread, tmp_path: Path) -> None:
    code, output = run_crash_demo(tmp_path, "--nexum", server.address, "--html", "page.html")
    assert code == 0, output
    assert f"Timeline as a page: {tmp_path / 'page.html'}" in output
    document = (tmp_path / "page.html").read_text(encoding="utf-8")
    (execution,) = pipelines(tmp_path, server.address)
    recorded = {
        (node["node_id"], attempt["attempt"]): (attempt["started_ms"], attempt["ended_ms"])
        for node in execution["nodes"]
        for attempt in node["attempts"]
    }
    drawn = {
        (str(bar["data-step"]), int(bar["data-attempt"] or 0)): (
            int(bar["data-start-ms"] or 0),
            int(bar["data-end-ms"] or 0),
        )
        for bar in having(document, "data-step", "bar")
    }
    assert drawn == recorded
    assert len(attempts(execution)) == 4
    (crash,) = having(document, "data-at-ms", "crash")
    assert int(crash["data-at-ms"] or 0) == recorded["validate", 1][1]


# ---- In a browser ----------------------------------------------------------------------------------------------------

# This script measures the drawn elements and stores the numbers, as JSON, in an attribute of the page's body.
MEASURE = """<script>
const box = e => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
const all = s => [...document.querySelectorAll(s)];
const style = getComputedStyle(document.body);
document.body.dataset.measured = JSON.stringify({
  track: box(document.querySelector('.axis .track')), width: document.documentElement.clientWidth,
  scroll: document.documentElement.scrollWidth, ink: style.color, paper: style.backgroundColor,
  bars: all('.bar').map(e => ({...e.dataset, box: box(e), lane: e.closest('.lane').dataset.worker})),
  labels: all('.label').map(e => ({text: e.textContent, box: box(e), lane: box(e.closest('.lane'))})),
  lanes: all('.lane').map(e => ({worker: e.dataset.worker, box: box(e)})),
  crashes: all('.crash').map(e => ({...e.dataset, box: box(e)}))});
</script></body>"""


def measured(folder: Path, document: str, *, width: int = 1100, dark: bool = False) -> dict[str, Any]:
    """Measure the page in Chromium. First remove the page's security policy, which forbids the measuring script."""
    document = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", document).replace("</body>", MEASURE)
    path = folder / "measured.html"
    path.write_text(document, encoding="utf-8")
    dumped = chromium(
        folder, [f"--window-size={width},1000", f"--blink-settings=preferredColorScheme={0 if dark else 1}"], path
    )
    found = re.search(r'data-measured="([^"]*)"', dumped)
    assert found, dumped[:2000]
    result: dict[str, Any] = json.loads(unescape(found[1]))
    return result


def chromium(folder: Path, options: Sequence[str], path: Path) -> str:
    assert CHROMIUM is not None
    # Chromium's sandbox needs rights that containers don't have. The page is trusted.
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    run = subprocess.run(
        [*command, *options, "--dump-dom", path.as_uri()],
        capture_output=True,
        timeout=60,
        encoding="utf-8",
        check=True,
    )
    return run.stdout


@in_a_browser
@pytest.mark.parametrize("width", [1100, 600])
def test_bars_and_crash_line_are_drawn_at_recorded_times(tmp_path: Path, width: int) -> None:
    seen = measured(tmp_path, page([made()]), width=width)
    left, _, right, _ = seen["track"]
    begun, ended = BEGUN_MS + 100, BEGUN_MS + 2200

    def x(at_ms: str) -> float:
        return float(left + (right - left) * (int(at_ms) - begun) / (ended - begun))

    assert len(seen["bars"]) == 5
    for bar in seen["bars"]:
        assert bar["box"][0] == pytest.approx(x(bar["startMs"]), abs=1)
        assert bar["box"][2] == pytest.approx(
            max(x(bar["endMs"]), bar["box"][0] + 4), abs=1
        )  # a bar is at least 4 px wide
    (crash,) = seen["crashes"]
    assert crash["box"][0] == pytest.approx(x(crash["atMs"]), abs=1)
    one, two = seen["lanes"]
    assert one["box"][3] <= two["box"][1]
    for bar in seen["bars"]:
        lane = one if bar["lane"] == "worker-1" else two
        assert lane["box"][1] <= bar["box"][1] < bar["box"][3] <= lane["box"][3]
    assert one["box"][1] - 1 <= crash["box"][1] < crash["box"][3] <= one["box"][3] + 1


@in_a_browser
@pytest.mark.parametrize("width", [1100, 600])
def test_labels_stay_within_their_lanes_and_the_page_within_the_window(tmp_path: Path, width: int) -> None:
    seen = measured(tmp_path, page([made()]), width=width)
    assert [one["text"] for one in seen["labels"]] == [
        "research 0.50 s",
        "validate 0.10 s",
        "summarize 1.20 s, lost",
        "summarize 0.01 s, attempt 2",
        "report 0.09 s",
    ]
    for label in seen["labels"]:
        assert label["lane"][0] <= label["box"][0]
        assert label["box"][2] <= label["lane"][2]
    assert seen["scroll"] <= seen["width"]


@in_a_browser
def test_page_follows_the_readers_colour_scheme(tmp_path: Path) -> None:
    def brightness(color: str) -> float:
        return sum(map(int, re.findall(r"\d+", color)[:3])) / 3

    light, dark = (measured(tmp_path, page([made()]), dark=dark) for dark in (False, True))
    assert brightness(light["paper"]) - brightness(light["ink"]) > 180
    assert brightness(dark["ink"]) - brightness(dark["paper"]) > 180


@in_a_browser
def test_a_script_in_a_record_does_not_run(tmp_path: Path) -> None:
    path = tmp_path / "evil.html"
    path.write_text(
        page([made("<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">")])
    )
    assert "<title>A pipeline that crashes and resumes</title>" in chromium(tmp_path, [], path)
