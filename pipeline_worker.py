"""Run the pipeline's steps (research, validate, summarize, report) with AutoGen agents, one step at a time.

Needs a Nexum server (`python -m nexum_engine`), and waits for one. With a model key the worker serves live and offline
pipelines; without one, only offline pipelines.

    python pipeline_worker.py
    python pipeline_worker.py --query "Impact of Rust on systems programming"          # start a pipeline, then work
    CRASH_AFTER=validate python pipeline_worker.py      # kill the worker once the server has recorded `validate`
    CRASH_DURING=summarize python pipeline_worker.py    # kill it when `summarize` has had its effect but isn't recorded
"""

from __future__ import annotations

from support.console import begin_script

begin_script(__name__)  # first, so that Ctrl+C during the slow imports prints no traceback

import argparse
import logging
import os
import socket
import sys
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nexum_engine import event_loop
from nexum_engine.client import NexumClient
from nexum_engine.records import Task
from nexum_engine.signals import stop_event
from nexum_engine.worker import Binding, Handler, TaskContext, Worker
from pipeline_workflow import OFFLINE_PIPELINE, PIPELINE, STEPS, PipelineInput, drill_version
from support.console import log_to, quick_imports, run_script, say
from support.models import ModelChoice, ModelChoiceError, choose_model
from support.options import add_nexum_option, add_until_stdin_closes_option
from support.pipeline.effects import EffectLog, now_ms
from support.processes import kill_this_process

SERVER_PATIENCE = 30.0  # seconds that --query waits for a server


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="CRASH_AFTER=STEP kills the worker once STEP is recorded, CRASH_DURING=STEP between the step's effect "
        f"and its record. The steps are {', '.join(STEPS)}.",
    )
    add_nexum_option(parser)
    parser.add_argument(
        "--offline", action="store_true", help="serve only offline pipelines, even if a model key is set"
    )
    parser.add_argument("--query", metavar="TEXT", help="start a pipeline with this query, then work")
    parser.add_argument(
        "--name",
        default=f"{socket.gethostname()}-{uuid.uuid4().hex[:6]}",
        help="the worker's id in the records is NAME-pid<process id>; give each worker another name (default: this "
        "host's name and a random suffix)",
    )
    parser.add_argument(
        "--drill", metavar="NAME", help="serve only the pipelines of this drill of crash_demo.py (default: all others)"
    )
    parser.add_argument("--effects", type=Path, metavar="FILE", help="append a line to FILE for each step's effect")
    add_until_stdin_closes_option(parser)
    return parser


def crash_point(variable: str, env: Mapping[str, str]) -> str | None:
    """Return the step that an environment variable names, or None. Raises ValueError if there is no such step."""
    step = env.get(variable, "").strip()
    if step and step not in STEPS:
        raise ValueError(f"{variable}={step} names no step; the steps are {', '.join(STEPS)}")
    return step or None


@dataclass(frozen=True)
class CrashPlan:
    """Log the effect of each step, and kill the worker at its crash point."""

    effects: EffectLog | None
    crash_after: str | None
    crash_during: str | None
    _done: set[tuple[str, str, int]] = field(default_factory=set)

    def around(self, handler: Handler) -> Handler:
        """Return a handler that runs `handler`, logs the step's effect and, if requested, crashes before the report."""

        async def run(task: TaskContext) -> object:
            begun_ms = now_ms()
            output = await handler(task)
            if self.effects is not None:
                self.effects.append(task, begun_ms)
            if task.node_id == self.crash_during:
                say(f"[pipeline] {task.node_id} has had its effect; crashing before its report, as requested")
                kill_this_process()
            self._done.add((task.execution_id, task.node_id, task.attempt))
            return output

        return run

    def after_report(self, task: Task) -> None:
        """If requested, crash when the server has acknowledged a step's result. Don't crash if the step failed."""
        if task.node_id == self.crash_after and (task.execution_id, task.node_id, task.attempt) in self._done:
            say(f"[pipeline] {task.node_id} is recorded; crashing now, as requested")
            kill_this_process()


def bindings(model: ModelChoice, plan: CrashPlan, drill: str | None) -> list[Binding]:
    """Return the workflows that a worker with this model can serve, each with its handlers."""
    # Import these modules late: they import AutoGen slowly, and a wrong command line should be reported at once.
    with quick_imports():
        from support.offline.pipeline import pipeline_model
        from support.offline.web import OfflineWeb
        from support.pipeline.steps import PipelineSteps
        from support.tools.web.live import LiveWeb

    pages = OfflineWeb()
    served = [(OFFLINE_PIPELINE, PipelineSteps(pages, lambda step: pipeline_model(step, pages.topics)))]
    if not model.offline:
        served.append((PIPELINE, PipelineSteps(LiveWeb(), lambda step: model.client())))
    return [
        Binding(
            drill_version(workflow, drill), {step: plan.around(handler) for step, handler in steps.handlers().items()}
        )
        for workflow, steps in served
    ]


async def start_pipeline(client: NexumClient, query: str, model: ModelChoice, drill: str | None) -> str:
    """Start the offline pipeline if the model is offline, else the live one. Return the execution's id."""
    workflow = drill_version(OFFLINE_PIPELINE if model.offline else PIPELINE, drill)
    await client.register_workflow(workflow, patience=SERVER_PATIENCE)
    started = await client.start_execution(workflow, PipelineInput(query=query))
    return started.execution_id


async def main(argv: list[str] | None = None) -> int:
    """Run the worker until a signal stops it. Return the exit code. Raises NexumError if the worker can't run."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        crash_after, crash_during = (crash_point(name, os.environ) for name in ("CRASH_AFTER", "CRASH_DURING"))
        model = choose_model(os.environ, offline=args.offline)
    except (ModelChoiceError, ValueError) as error:
        parser.error(str(error))
    if args.query is not None and not args.query.strip():
        parser.error("the query is empty")

    stop = stop_event(until_stdin_closes=args.until_stdin_closes)
    worker_id = f"{args.name}-pid{os.getpid()}"
    plan = CrashPlan(EffectLog(args.effects, worker_id) if args.effects else None, crash_after, crash_during)
    say(f"[pipeline] Model: {model.description}")
    async with NexumClient(args.nexum) as client:
        worker = Worker(
            client,
            bindings(model, plan, args.drill),
            concurrency=1,
            worker_id=worker_id,
            after_report=plan.after_report,
        )
        if args.query is not None:
            execution_id = await start_pipeline(client, args.query.strip(), model, args.drill)
            where = f" --nexum {args.nexum}" if args.nexum else ""
            say(f"[pipeline] started {execution_id} (python -m nexum_engine show {execution_id}{where})")
        await worker.run(stop)
    return 0


if __name__ == "__main__":
    log_to(sys.stdout, logging.WARNING, "%(asctime)s [pipeline] %(message)s")
    logging.getLogger("nexum_engine").setLevel(logging.INFO)
    run_script(lambda: event_loop.run(main()))
