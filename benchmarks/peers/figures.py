"""The measurements of a peer, and the tables and the chart that show them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from math import log
from statistics import median, quantiles
from typing import Any

from peers.base import IN_FLIGHT, RECORDED, Call, Group, Peer

OURS = "nexum-"


@dataclass
class Durable:
    """What the traced calls wrote to disk."""

    calls: int
    request: int
    """How many calls had an fsync before the tool ran."""
    result: int
    """How many calls had an fsync after the tool ran and before the caller had the result."""
    syncs: float
    """How many fsyncs all processes completed, divided by the number of calls."""
    files: list[str]
    """The names of the files with an fsync during the calls."""

    @staticmethod
    def of(calls: Sequence[Call], syncs: Sequence[tuple[float, float, str]]) -> Durable:
        """Count the fsyncs of each call."""
        request = result = total = 0
        files: dict[str, None] = {}
        for call in calls:
            inside = [sync for sync in syncs if call.began <= sync[0] and sync[1] <= call.ended]
            total += len(inside)
            files.update((file, None) for _, _, file in inside)
            request += any(end <= call.executed for _, end, _ in inside)
            result += any(begin >= call.executed for begin, _, _ in inside)
        return Durable(len(calls), request, result, round(total / len(calls), 2), list(files))

    def __str__(self) -> str:
        """Return in words what was on disk when the caller got its result."""
        if not self.result:
            return "nothing" if not self.request else f"request only ({self.request}/{self.calls})"
        both = "request, result" if self.request == self.calls else "result"
        return both if self.result == self.calls else f"result in {self.result}/{self.calls}"


@dataclass
class Row:
    """The measurements of one peer, in seconds, calls per second and MB."""

    peer: Peer
    calls: list[float] = field(default_factory=list)
    commits: list[float] = field(default_factory=list)
    """Plain SQLite commits. A block of commits follows each block of calls."""
    blocks: list[float] = field(default_factory=list)
    """For each block, the median of the calls divided by the median of the commits."""
    rates: list[float] = field(default_factory=list)
    replays: list[float] = field(default_factory=list)
    replayed: list[int] = field(default_factory=list)
    """For each replay, how many calls were not executed again."""
    recoveries: list[float] = field(default_factory=list)
    starts: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    durable: Durable | None = None
    failure: str | None = None

    def add(self, calls: Sequence[float], commits: Sequence[float]) -> None:
        """Add the times of a block of calls, and of the block of commits after it."""
        self.calls += calls
        self.commits += commits
        self.blocks.append(median(calls) / median(commits))

    def figures(self) -> dict[str, Any]:
        """Return the row for JSON: times in milliseconds, and their ratios to a commit."""
        found: dict[str, Any] = {
            "name": self.peer.name,
            "title": self.peer.title,
            "group": self.peer.group.value,
            "setup": self.peer.setup,
            "pages": list(self.peer.pages),
            "versions": self.peer.versions(),
            "failure": self.failure,
        }
        if not self.calls:
            return found
        commit = median(self.commits)
        cuts = quantiles(self.calls, n=100, method="inclusive")
        seconds = {
            "p50": cuts[49],
            "p99": cuts[98],
            "replay": _middle(self.replays),
            "recovery": _middle(self.recoveries),
            "start": _middle(self.starts),
        }
        found |= {f"{key}_ms": None if it is None else round(it * 1000, 3) for key, it in seconds.items()}
        found |= {
            f"{key}_in_commits": None if it is None else float(f"{it / commit:.3g}") for key, it in seconds.items()
        }
        low, middle, high = quantiles(self.blocks, n=4, method="inclusive") if len(self.blocks) > 1 else self.blocks * 3
        found |= {"p50_in_commits": float(f"{middle:.3g}"), "middle_half": f"{low:.3g} to {high:.3g}"}
        rate = _middle(self.rates)
        return found | {
            "calls": len(self.calls),
            "commit_ms": round(commit * 1000, 3),
            "calls_per_second": None if rate is None else round(rate, 1),
            "calls_per_commit_time": None if rate is None else float(f"{rate * commit:.3g}"),
            "replayed": min(self.replayed, default=None),
            "memory_mb": None if not self.memory else round(median(self.memory), 1),
            "durable": None if self.durable is None else vars(self.durable),
            "on_disk": "not checked" if self.durable is None else str(self.durable),
        }


def _middle(values: Sequence[float]) -> float | None:
    return median(values) if values else None


Columns = Sequence[tuple[str, str, float]]
"""The columns of a table: each has a heading, the name of a figure, and a divisor."""
RATIOS: Columns = (
    ("p50", "p50_in_commits", 1),
    ("middle half", "middle_half", 1),
    ("p99", "p99_in_commits", 1),
    (f"calls, {IN_FLIGHT} runs", "calls_per_commit_time", 1),
    (f"replay of {RECORDED}", "replay_in_commits", 1),
    ("recovery", "recovery_in_commits", 1),
    ("start", "start_in_commits", 1),
)
RAW: Columns = (
    ("p50 ms", "p50_ms", 1),
    ("p99 ms", "p99_ms", 1),
    (f"calls/s, {IN_FLIGHT} runs", "calls_per_second", 1),
    (f"replay of {RECORDED} ms", "replay_ms", 1),
    ("recovery s", "recovery_ms", 1000),
    ("start s", "start_ms", 1000),
    ("MB", "memory_mb", 1),
)


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as text: for each group, a table of ratios and a table of times."""
    parts = []
    for group in Group:
        if own := [row for row in rows if row["group"] == group.value]:
            parts.append(_table(f"{group.value.upper()}, in plain SQLite commits", own, RATIOS))
            parts.append(_table(f"{group.value.upper()}, as measured", own, RAW))
    return "\n\n".join(parts)


def _table(title: str, rows: Sequence[dict[str, Any]], columns: Columns) -> str:
    cells = [["", *(head for head, _, _ in columns), "on disk when the caller has the result"]]
    failed = []
    for row in rows:
        if row["failure"] is not None or "p50_ms" not in row:
            failed.append(f"{row['title']}  failed: {row['failure']}")
            continue
        numbers = [_number(row[figure], divisor) for _, figure, divisor in columns]
        lost = row["replayed"] is not None and row["replayed"] < RECORDED
        kept = f"; after a kill, {row['replayed']} of {RECORDED} were kept" if lost else ""
        cells.append([row["title"], *numbers, row["on_disk"] + kept])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [title]
    for first, *numbers, last in cells:
        middle = "".join(f"  {text:>{width}}" for text, width in zip(numbers, widths[1:-1], strict=True))
        lines.append(f"{first:<{widths[0]}}{middle}  {last}")
    return "\n".join(lines + failed)


def _number(value: float | str | None, divisor: float = 1) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    value /= divisor
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def notes(rows: Sequence[dict[str, Any]]) -> str:
    """Return notes on each row: its setup, the pages of the documentation, and the observed fsyncs."""
    lines = []
    for row in rows:
        lines.append(f"{row['title']} [{row['name']}]")
        lines.append(f"    {row['setup']}")
        lines += [f"    {page}" for page in row["pages"]]
        if row["versions"]:
            lines.append("    " + ", ".join(f"{name} {version}" for name, version in row["versions"].items()))
        if seen := row.get("durable"):
            files = ", ".join(seen["files"][:4]) or "none"
            lines.append(
                f"    fsyncs: {seen['syncs']:g} a call ({files}); before the tool ran in {seen['request']} of "
                f"{seen['calls']} calls, between the tool and the caller's result in {seen['result']}"
            )
    return "\n".join(lines)


# ---- The chart -------------------------------------------------------------------------------------------------------

WIDTH, LABELS, BAR, GAP, TOP = 900, 400, 18, 8, 34
INK, OUR_COLOUR, OTHER_COLOUR, GRID = "#1f2328", "#1a7f5a", "#8c959f", "#d8dee4"


def chart(rows: Sequence[dict[str, Any]], note: str) -> str:
    """Return a chart as SVG: each row's median latency in commits, on a logarithmic scale. Each group has a panel."""
    shown = [row for row in rows if row.get("p50_in_commits")]
    low = min([0.1, *(row["p50_in_commits"] for row in shown)])
    high = max([10.0, *(row["p50_in_commits"] for row in shown)])
    decades = [10.0**power for power in range(-4, 7)]
    low = max(decade for decade in decades if decade <= low)
    high = min(decade for decade in decades if decade >= high)
    room = WIDTH - LABELS - 70

    def x(value: float) -> float:
        return LABELS + room * log(value / low) / log(high / low)

    parts, y = [], 24.0
    parts.append(
        _text(
            10,
            y,
            "One durable tool call, median latency in plain SQLite commits (logarithmic; less is better)",
            bold=True,
        )
    )
    for group in Group:
        own = sorted((row for row in shown if row["group"] == group.value), key=lambda row: row["p50_in_commits"])
        if not own:
            continue
        y += TOP
        parts.append(_text(10, y, group.value, bold=True))
        begin = y + 8
        y = begin + len(own) * (BAR + GAP)
        for decade in decades:
            if low <= decade <= high:
                parts.append(f'<path d="M{x(decade):.1f} {begin} V{y}" stroke="{GRID}"/>')
                parts.append(_text(x(decade), y + 14, f"{decade:g}", anchor="middle"))
        for number, row in enumerate(own):
            top = begin + number * (BAR + GAP) + GAP / 2
            colour = OUR_COLOUR if row["name"].startswith(OURS) else OTHER_COLOUR
            end = x(row["p50_in_commits"])
            kept = row["on_disk"].startswith(("result", "request, result")) and "/" not in row["on_disk"]
            fill = f'fill="{colour}"' if kept else f'fill="none" stroke="{colour}" stroke-dasharray="4 2"'
            parts.append(_text(LABELS - 8, top + BAR - 5, row["title"], anchor="end"))
            parts.append(f'<rect x="{LABELS}" y="{top}" width="{max(end - LABELS, 1):.1f}" height="{BAR}" {fill}/>')
            parts.append(_text(end + 6, top + BAR - 5, f"{row['p50_in_commits']:.3g}"))
        y += 16
    y += 22
    parts.append(
        _text(10, y, "Green: this project. Outlined: the result was not seen to be on disk when the caller had it.")
    )
    y += 16
    parts.append(_text(10, y, note))
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y + 12:.0f}" '
        f'font-family="sans-serif" font-size="12">\n<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def _text(x: float, y: float, text: str, *, anchor: str = "start", bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{INK}" text-anchor="{anchor}"{weight}>{escape(text)}</text>'
