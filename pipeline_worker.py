"""The pipeline's worker: runs research, validate, summarize and report with AutoGen agents, one step at a time.

Needs a Nexum server (`python -m nexum_engine`), and waits for one. With a model key it serves live pipelines as well as
offline ones; without, offline ones alone.

    python pipeline_worker.py
    python pipeline_worker.py --query "Impact of Rust on systems programming"          # start one, then work
    CRASH_AFTER=validate python pipeline_worker.py      # is killed as soon as the server has recorded `validate`
    CRASH_DURING=summarize python pipeline_worker.py    # is killed after the step's effect, before its record
"""

from __future__ import annotations

from support.console import begin_script

begin_script(__name__)  # before the slow imports

import argparse
import asyncio
import logging
import os
import socket
import sys
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from nexum_engine.client import DEFAULT_ADDRESS, NexumClient
from nexum_engine.errors import NexumError
from nexum_engine.records import Task
from nexum_engine.signals import stop_event
from nexum_engine.worker import Binding, Handler, TaskContext, Worker
from nexum_engine.workflow import Workflow
from pipeline_workflow import OFFLINE_PIPELINE, PIPELINE, STEPS, PipelineInput, drill_version
from support.console import complain, log_to, run_script, say
from support.launcher import kill_this_process
from support.models import ModelChoice, ModelChoiceError, choose_model
from support.pipeline.effects import EffectLog

if TYPE_CHECKING:
    from autogen_core.models import ChatCompletionClient

SERVER_PATIENCE = 30.0  # seconds that --query waits for a server


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog=f"CRASH_AFTER=STEP kills the worker once STEP is recorded, CRASH_DURING=STEP between its effect and its "
        f"record. The steps are {', '.join(STEPS)}.",
    )
    parser.add_argument(
        "--nexum",
        default=os.environ.get("NEXUM_ADDRESS") or None,
        metavar="HOST:PORT",
        help=f"the server (default: $NEXUM_ADDRESS, else the server of this folder's database, else {DEFAULT_ADDRESS})",
    )
    parser.add_argument("--offline", action="store_true", help="serve offline pipelines alone, whatever keys are set")
    parser.add_argument("--query", metavar="TEXT", help="start a pipeline with this query first")
    parser.add_argument(
        "--name",
        default=f"{socket.gethostname()}-{uuid.uuid4().hex[:6]}",
        help="its id in the records is NAME-pid<process id>; no two workers may share one (default: this host's "
        "name and a random ending)",
    )
    parser.add_argument(
        "--drill", metavar="NAME", help="serve the pipelines of this drill of crash_demo.py alone (default: all others)"
    )
    parser.add_argument("--effects", type=Path, metavar="FILE", help="append a line for each step's effect")
    parser.add_argument(
        "--until-stdin-closes", action="store_true", help="end with the process that holds standard input"
    )
    return parser


def crash_point(variable: str, env: Mapping[str, str]) -> str | None:
    """The step that a variable names. Raises ValueError for one that doesn't exist."""
    step = env.get(variable, "").strip()
    if step and step not in STEPS:
        raise ValueError(f"{variable}={step} names no step; the steps are {', '.join(STEPS)}")
    return step or None


@dataclass(frozen=True)
class Acting:
    """What happens around a step's work: its effect is written to the log, and the worker dies where it was told to."""

    effects: EffectLog | None
    crash_after: str | None
    crash_during: str | None
    _done: set[tuple[str, str, int]] = field(default_factory=set)

    def around(self, handler: Handler) -> Handler:
        """The handler, with what happens between its work and its report."""

        async def run(task: TaskContext) -> object:
            output = await handler(task)
            if self.effects is not None:
                self.effects.append(task)
            if task.node_id == self.crash_during:
                say(f"[pipeline] {task.node_id} has had its effect; crashing before its report, as asked")
                kill_this_process()
            self._done.add((task.execution_id, task.node_id, task.attempt))
            return output

        return run

    def after_report(self, task: Task) -> None:
        """A report was acknowledged; only a result is a record, a failure isn't."""
        if task.node_id == self.crash_after and (task.execution_id, task.node_id, task.attempt) in self._done:
            say(f"[pipeline] {task.node_id} is recorded; crashing now, as asked")
            kill_this_process()


def bindings(model: ModelChoice, acting: Acting, drill: str | None) -> list[Binding]:
    """The workflows that this worker can serve with this model, in the version of the drill if there is one."""
    # Here, so that a wrong command line is told at once: they import AutoGen.
    from support.offline.pipeline import pipeline_model
    from support.offline.web import OfflineWeb
    from support.pipeline.steps import PipelineSteps
    from support.tools.web.live import LiveWeb

    pages = OfflineWeb()

    def offline_client(step: str) -> ChatCompletionClient:
        return pipeline_model(step, pages.topics())

    served = [(OFFLINE_PIPELINE, PipelineSteps(pages, offline_client))]
    if not model.offline:
        served.append((PIPELINE, PipelineSteps(LiveWeb(), lambda step: model.client())))
    return [
        Binding(
            version_of(workflow, drill), {step: acting.around(handler) for step, handler in steps.handlers().items()}
        )
        for workflow, steps in served
    ]


def version_of(pipeline: Workflow, drill: str | None) -> Workflow:
    """The version of the pipeline that a worker of the drill serves; without a drill, the plain one."""
    return pipeline if drill is None else drill_version(pipeline, drill)


async def start_pipeline(client: NexumClient, query: str, model: ModelChoice, drill: str | None) -> None:
    """Start an execution, live if there is a model for it."""
    workflow = version_of(OFFLINE_PIPELINE if model.offline else PIPELINE, drill)
    await client.register_workflow(workflow, patience=SERVER_PATIENCE)
    started = await client.start_execution(workflow, PipelineInput(query=query))
    say(f"[pipeline] started {started.execution_id} (python -m nexum_engine show {started.execution_id})")


async def main(argv: list[str] | None = None) -> int:
    """Work until told to stop; the exit code."""
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
    acting = Acting(EffectLog(args.effects) if args.effects else None, crash_after, crash_during)
    say(f"[pipeline] Model: {model.description}")
    try:
        async with NexumClient(args.nexum) as client:
            worker = Worker(
                client,
                bindings(model, acting, args.drill),
                concurrency=1,
                worker_id=f"{args.name}-pid{os.getpid()}",
                after_report=acting.after_report,
            )
            if args.query is not None:
                await start_pipeline(client, args.query.strip(), model, args.drill)
            await worker.run(stop)
    except NexumError as error:
        complain(f"error: {error}")
        return 2
    return 0


if __name__ == "__main__":
    log_to(sys.stdout, logging.WARNING, "%(asctime)s [pipeline] %(message)s")
    logging.getLogger("nexum_engine").setLevel(logging.INFO)
    run_script(lambda: asyncio.run(main()))
