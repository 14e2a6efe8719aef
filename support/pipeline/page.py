"""Show runs of the pipeline on one HTML page, with a lane for each worker. The data comes from the server's records.

The page loads no script, font or picture. Text from records is escaped, and the page's security policy forbids the
browser to load or run anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from html import escape

from nexum_engine.records import Outcome
from support.pipeline.evidence import PipelineRun, Row, SeenWorker, problems, remarks

MAX_TICKS = 8
LABEL_ROOM = 45.0  # percent of a track's width that is kept free for a label
TICK_STEPS = (1, 2, 5)  # the milliseconds between ticks: one of these numbers, multiplied by a power of ten

_STYLE = """
:root { color-scheme: light dark; --page: #fbfbfa; --ink: #1c1d1f; --soft: #5c6066; --line: #d7d9dc; --lane: #f0f1f2;
  --done: #2f6fb3; --lost: #b3541e; --crash: #b3261e; --good: #1f7a3d; }
@media (prefers-color-scheme: dark) { :root { --page: #17181a; --ink: #e9eaec; --soft: #a5a9af; --line: #3a3d41;
  --lane: #212326; --done: #6ea8e6; --lost: #e39a5f; --crash: #f2857d; --good: #74c98f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem; max-width: 62rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .5rem; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .25rem; }
p { margin: .25rem 0; } .soft { color: var(--soft); } .mono, pre, td { font-variant-numeric: tabular-nums; }
.mono, pre { font-family: ui-monospace, Consolas, monospace; font-size: .85rem; overflow-wrap: anywhere; }
.verdict { font-weight: 600; color: var(--good); } .verdict.bad { color: var(--crash); }
.chart { margin: 1rem 0; } .lane, .axis { display: flex; }
.lane { background: var(--lane); border-radius: .4rem; margin-bottom: .4rem; }
.who { flex: 0 0 8.5rem; padding: .5rem .75rem; font-weight: 600; } .who small { display: block; font-weight: 400; }
.track { flex: 1; position: relative; margin: .5rem .75rem .5rem 0; min-height: 1.9rem; }
.row { position: relative; height: 1.9rem; }
.bar { position: absolute; top: .35rem; height: 1.2rem; min-width: 4px; border-radius: 3px; background: var(--done); }
.bar.lost { background: repeating-linear-gradient(135deg, var(--lost) 0 5px, transparent 5px 9px);
  border: 1px solid var(--lost); }
.label { position: absolute; top: .2rem; white-space: nowrap; font-size: .9rem; padding: 0 .5rem; }
.inside { top: .3rem; margin-left: .5rem; line-height: 1.3rem; background: var(--lane); border-radius: 3px; }
.crash { position: absolute; top: -.5rem; bottom: -.5rem; border-left: 2px dashed var(--crash); }
.fate { color: var(--crash); font-size: .9rem; font-weight: 400; }
.axis .track { height: 1.5rem; min-height: 0; margin-top: 0; border-top: 1px solid var(--line); font-size: .8rem; }
.tick { position: absolute; color: var(--soft); border-left: 1px solid var(--line); padding-left: .25rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; padding: .3rem .75rem .3rem 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
td.number, th.number { text-align: right; }
pre { white-space: pre-wrap; background: var(--lane); padding: 1rem; border-radius: .4rem; }
@media (max-width: 40rem) { body { padding: .75rem; } .lane, .axis { flex-direction: column; }
  .axis .who { display: none; }
  .who { flex-basis: auto; padding-bottom: 0; } .track { margin: .25rem .75rem .5rem; } }
"""


def page(runs: Sequence[PipelineRun]) -> str:
    """Return the HTML document that shows the runs."""
    sections = "\n".join(_section(run) for run in runs)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>A pipeline that crashes and resumes</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>A pipeline that crashes and resumes</h1>
<p class="soft">Each lane is a worker process, and each bar is an attempt at a step, with its times from
{runs[0].source}. A dashed line is a worker's death as recorded: at the worker's last report, or at the end of the
attempt that it held.</p>
{sections}
</body>
</html>
"""


def _section(run: PipelineRun) -> str:
    wrong = problems(run)
    said = "\n".join(f"<p>{escape(remark)}</p>" for remark in remarks(run))
    verdict = f"Failed: {'; '.join(wrong)}" if wrong else "Every step is recorded once."
    report = f"<h3>The report</h3>\n<pre>{escape(run.report)}</pre>" if run.report else ""
    begun = datetime.fromtimestamp(run.execution.created_ms / 1000, tz=timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    return f"""<section data-execution="{escape(run.execution.execution_id)}" data-point="{escape(str(run.point))}">
<h2>Crash {escape(str(run.point))}: {escape(run.query)}</h2>
<p class="soft mono">{escape(run.execution.execution_id)}, {run.execution.status.value}, started {begun}</p>
<p class="verdict{" bad" if wrong else ""}">{escape(verdict)}</p>
{said}
{_chart(run)}
{_table(run)}
{report}
</section>"""


class _Scale:
    """A scale that converts times of the execution, in milliseconds, to percentages of a track's width."""

    def __init__(self, run: PipelineRun) -> None:
        ends = [row.attempt.ended_ms or row.attempt.started_ms for row in run.rows]
        self.from_ms = run.begun_ms
        self.to_ms = max([run.execution.ended_ms or 0, self.from_ms + 1, *ends])

    def percent(self, at_ms: int) -> float:
        return round(100 * (at_ms - self.from_ms) / (self.to_ms - self.from_ms), 3)

    def ticks(self) -> list[int]:
        """Return the times of the ticks: round numbers of milliseconds since the start."""
        length = self.to_ms - self.from_ms
        power = 1
        while True:
            for step in TICK_STEPS:
                if length <= MAX_TICKS * step * power:
                    return list(range(0, length + 1, step * power))
            power *= 10


def _chart(run: PipelineRun) -> str:
    scale = _Scale(run)
    lanes = "\n".join(_lane(run, worker, scale) for worker in run.workers)
    ticks = "".join(
        f'<span class="tick" style="left:{scale.percent(scale.from_ms + ms)}%">{ms / 1000:g} s</span>'
        for ms in scale.ticks()
        if scale.percent(scale.from_ms + ms) < 97  # beyond 97 percent, a label would stick out of the page
    )
    return f"""<div class="chart">
{lanes}
<div class="axis" aria-hidden="true"><div class="who"></div>
<div class="track" data-from-ms="{scale.from_ms}" data-to-ms="{scale.to_ms}">{ticks}</div></div>
</div>"""


def _lane(run: PipelineRun, worker: SeenWorker, scale: _Scale) -> str:
    rows = [row for row in run.rows if row.worker is worker]
    bars = "\n".join(_bar(row, scale) for row in rows)
    name = escape(worker.name)
    fate = f'<small class="fate">{escape(worker.death)}</small>' if worker.death else ""
    crash = ""
    if worker.death and rows:
        at_ms = rows[-1].attempt.ended_ms or rows[-1].attempt.started_ms
        crash = (
            f'<div class="crash" data-worker="{name}" data-at-ms="{at_ms}" style="left:{scale.percent(at_ms)}%" '
            f'title="{name} died: {escape(worker.death)}"></div>'
        )
    empty = "" if rows else '<span class="label soft">took no step</span>'
    return f"""<div class="lane" data-worker="{name}">
<div class="who">{name}<small class="soft">pid {worker.pid}</small>{fate}</div>
<div class="track">{bars}{crash}{empty}</div>
</div>"""


def _bar(row: Row, scale: _Scale) -> str:
    attempt = row.attempt
    end_ms = attempt.ended_ms or scale.to_ms
    left, right = scale.percent(attempt.started_ms), scale.percent(end_ms)
    step = escape(row.node.node_id)
    shown = [f"<b>{step}</b> {(end_ms - attempt.started_ms) / 1000:.2f} s"]
    if attempt.attempt > 1:
        shown.append(f"attempt {attempt.attempt}")
    if attempt.outcome is not Outcome.COMPLETED:
        shown.append(attempt.outcome.value.lower())
    where, side = "label", f"left:{right}%"
    if right > 100 - LABEL_ROOM:
        where, side = ("label", f"right:{100 - left:.3f}%") if left > LABEL_ROOM else ("label inside", f"left:{left}%")
    return (
        f'<div class="row"><div class="bar{"" if attempt.outcome is Outcome.COMPLETED else " lost"}" '
        f'data-step="{step}" data-attempt="{attempt.attempt}" data-outcome="{attempt.outcome.value}" '
        f'data-start-ms="{attempt.started_ms}" data-end-ms="{end_ms}" '
        f'style="left:{left}%;width:{right - left:.3f}%"></div>'
        f'<span class="{where}" style="{side}">{", ".join(shown)}</span></div>'
    )


def _table(run: PipelineRun) -> str:
    begun_ms = run.begun_ms
    rows = "\n".join(
        f"<tr><td>{escape(row.node.node_id)}</td><td>{row.attempt.attempt}</td>"
        f"<td>{escape(row.attempt.worker_id)}</td>"
        f'<td class="number">{(row.attempt.started_ms - begun_ms) / 1000:.3f} s</td>'
        f'<td class="number">{_took(row)}</td><td>{escape(row.outcome)}</td></tr>'
        for row in run.rows
    )
    return f"""<div class="wide"><table>
<thead><tr><th>Step</th><th>Attempt</th><th>Worker</th><th class="number">Start</th><th class="number">Took</th>
<th>Outcome</th></tr></thead>
<tbody>
{rows}
</tbody></table></div>"""


def _took(row: Row) -> str:
    if row.attempt.ended_ms is None:
        return "-"
    return f"{(row.attempt.ended_ms - row.attempt.started_ms) / 1000:.3f} s"
