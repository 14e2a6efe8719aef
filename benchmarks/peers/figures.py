"""What was measured of a peer, and how it is shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from statistics import median, quantiles
from typing import Any

from peers.base import IN_FLIGHT, RECORDED, Call, Group, Peer

OURS = ("nexum-", "published")


@dataclass
class Durable:
    """How many of the traced calls had an fsync before the tool ran, and between the tool and the caller's result."""

    calls: int
    request: int
    result: int
    syncs: float
    """Completed fsyncs a call, of all processes."""
    files: list[str]

    @staticmethod
    def of(calls: Sequence[Call], syncs: Sequence[tuple[float, float, str]]) -> Durable:
        """Assign the fsyncs to the calls."""
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
        """Say what was on disk when the caller had its result."""
        if not self.result:
            return "nothing" if not self.request else f"request only ({self.request}/{self.calls})"
        both = "request, result" if self.request == self.calls else "result"
        return both if self.result == self.calls else f"result in {self.result}/{self.calls}"


@dataclass
class Row:
    """The measurements of one peer, in seconds, calls a second and MB."""

    peer: Peer
    calls: list[float] = field(default_factory=list)
    commits: list[float] = field(default_factory=list)
    """Plain SQLite commits, made in turn with the calls."""
    rates: list[float] = field(default_factory=list)
    replays: list[float] = field(default_factory=list)
    replayed: list[int] = field(default_factory=list)
    recoveries: list[float] = field(default_factory=list)
    starts: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    durable: Durable | None = None
    failure: str | None = None

    def figures(self) -> dict[str, Any]:
        """Return the row as JSON: milliseconds, and ratios to the commit."""
        found: dict[str, Any] = {
            "name": self.peer.name,
            "title": self.peer.title,
            "group": self.peer.group.value,
            "setup": self.peer.setup,
            "pages": list(self.peer.pages),
            "failure": self.failure,
        }
        if not self.calls:
            return found
        commit = median(self.commits)
        cuts = quantiles(self.calls, n=100)
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


HEADS = (
    "",
    "p50 ms",
    "p99 ms",
    "p50",
    f"calls/s at {IN_FLIGHT}",
    f"replay {RECORDED} ms",
    "recovery s",
    "start s",
    "MB",
)


def table(rows: Sequence[dict[str, Any]], group: Group) -> str:
    """Return the rows of a group as a text table."""
    cells = [[*HEADS, "on disk when the caller has the result"]]
    for row in rows:
        if row["group"] != group.value:
            continue
        if row["failure"] is not None or "p50_ms" not in row:
            cells.append([row["title"], f"failed: {row['failure']}"])
            continue
        cells.append(
            [
                row["title"],
                _number(row["p50_ms"]),
                _number(row["p99_ms"]),
                f"{row['p50_in_commits']:.2f} c",
                _number(row["calls_per_second"]),
                _replay(row),
                _number(row["recovery_ms"], 1000),
                _number(row["start_ms"], 1000),
                _number(row["memory_mb"]),
                row["on_disk"],
            ]
        )
    widths = [max(len(line[column]) for line in cells if len(line) > 2) for column in range(len(cells[0]))]
    lines = [group.value.upper()]
    for line in cells:
        first, *rest = line
        if len(line) == 2:
            lines.append(f"{first:<{widths[0]}}  {rest[0]}")
            continue
        *numbers, last = rest
        middle = "".join(f"  {text:>{width}}" for text, width in zip(numbers, widths[1:-1], strict=True))
        lines.append(f"{first:<{widths[0]}}{middle}  {last}")
    return "\n".join(lines)


def _replay(row: dict[str, Any]) -> str:
    if row["replay_ms"] is None:
        return "-"
    lost = "" if row["replayed"] == RECORDED else f" ({row['replayed']} kept)"
    return _number(row["replay_ms"]) + lost


def _number(value: float | None, divisor: float = 1) -> str:
    if value is None:
        return "-"
    value /= divisor
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def notes(rows: Sequence[dict[str, Any]]) -> str:
    """Return how each row was set up, by which pages, and what was seen of its fsyncs."""
    lines = []
    for row in rows:
        lines.append(f"{row['title']} [{row['name']}]")
        lines.append(f"    {row['setup']}")
        lines += [f"    {page}" for page in row["pages"]]
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
    """Return the median latency of all rows as an SVG, in commits on a logarithmic scale, one panel a group."""
    shown = [row for row in rows if row.get("p50_in_commits")]
    low = min([0.1, *(row["p50_in_commits"] for row in shown)])
    high = max([10.0, *(row["p50_in_commits"] for row in shown)])
    decades = [10.0**power for power in range(-4, 7)]
    low = max(decade for decade in decades if decade <= low)
    high = min(decade for decade in decades if decade >= high)
    room = WIDTH - LABELS - 70

    def x(value: float) -> float:
        from math import log

        return LABELS + room * log(value / low) / log(high / low)

    parts, y = [], 24.0
    parts.append(
        _text(10, y, "One durable tool call, median latency in plain SQLite commits (less is better)", bold=True)
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
