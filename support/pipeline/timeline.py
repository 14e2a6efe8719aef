"""Show the attempts and the workers' deaths of a pipeline run as a text table, 80 columns wide."""

from __future__ import annotations

from support.pipeline.evidence import PipelineRun, Row, SeenWorker

WIDTH = 80


def timeline(run: PipelineRun) -> str:
    """Return the table of a run's attempts. Start times count from the first attempt."""
    lines = [
        f"Timeline of {run.execution.execution_id} (from {run.source})",
        "",
        f"{'STEP':<9} {'ATTEMPT':<7} {'WORKER':<26} {'START s':>7} {'TOOK s':>7}  OUTCOME",
    ]
    begun: list[SeenWorker] = []
    for row in run.rows:
        if row.worker is not None and row.worker not in begun:
            lines += [_rule(text) for text in _between(run, row.worker, row.node.node_id)]
            begun.append(row.worker)
        lines.append(_line(run, row))
    return "\n".join(lines)


def _line(run: PipelineRun, row: Row) -> str:
    attempt = row.attempt
    start = f"+{(attempt.started_ms - run.begun_ms) / 1000:.2f}"
    took = f"{(attempt.ended_ms - attempt.started_ms) / 1000:.2f}" if attempt.ended_ms else "-"
    return (
        f"{row.node.node_id:<9} {attempt.attempt:<7} {attempt.worker_id[:26]:<26} {start:>7} {took:>7}  {row.outcome}"
    )


def _between(run: PipelineRun, worker: SeenWorker, step: str) -> list[str]:
    """Return the lines before the first attempt of `worker`: which workers died, and at which step `worker` resumes."""
    number = run.workers.index(worker)
    # If another worker resumed earlier, the lines before that worker's first attempt already show some of the deaths.
    # Leave those deaths out.
    earlier = [run.workers.index(other) for other, _ in run.resumptions]
    shown = max((index for index in earlier if index < number), default=0)
    deaths = [f"{one.name} died: {one.death}" for one in run.workers[shown:number] if one.death]
    return [*deaths, f"{worker.name} resumes at {step}"] if number else []


def _rule(text: str) -> str:
    return f"--- {text} ".ljust(WIDTH - 1, "-")
