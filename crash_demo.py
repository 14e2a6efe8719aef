"""Kill the worker of a four-step agent pipeline; a new worker resumes exactly where the record ends.

    research -> validate -> [worker 1 is killed] -> summarize -> report
                                                    ^ worker 2 resumes here

If no Nexum server answers, the script opens the database itself for the run. It always starts its own workers. Without
a model key the agents answer offline.

    python crash_demo.py                                # kill worker 1 after validate
    python crash_demo.py --crash-after research
    python crash_demo.py --query "Impact of Rust on systems programming" --html timeline.html
    python crash_demo.py --all                          # every crash point, also within a step
    python crash_demo.py --graphflow                    # instead: interrupt a GraphFlow, and resume it
    python crash_demo.py --cyclic                       # the same for a GraphFlow with a loop
    python crash_demo.py --effect                       # instead: kill workers between a charge and its record
"""

from __future__ import annotations

from support.console import begin_script

begin_script(__name__)  # first, so that Ctrl+C during the slow imports prints no traceback

import argparse
import asyncio
import logging
import os
import secrets
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from nexum_engine.client import NexumClient
from nexum_engine.embedded import EmbeddedNexum
from nexum_engine.errors import NexumError
from pipeline_workflow import STEPS
from submit_task import Session
from support.console import (
    argument_text,
    complain,
    let_ctrl_c_cancel,
    log_to,
    run_script,
    say,
    say_after_ctrl_c,
    say_what_is_logged,
)
from support.graphflow.comparison import compare
from support.models import OFFLINE_NOTE, ModelChoice, ModelChoiceError, choose_model
from support.options import add_nexum_option
from support.pipeline.drill import Drill
from support.pipeline.effects import EffectLog
from support.pipeline.evidence import CrashPoint, PipelineRun, effect_times, problems, remarks
from support.pipeline.page import page
from support.pipeline.timeline import timeline
from support.processes import DrillFailed, say_what_is_lost
from support.session_file import SessionFile

QUERY = "Impact of Rust on systems programming"
CRASH_AFTER = STEPS[:-1]  # without the last step, after which nothing is left to resume
EVERY_POINT = (*(CrashPoint(step) for step in CRASH_AFTER), CrashPoint("summarize", within=True))


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        # argparse would write the alternatives in one long line.
        usage="%(prog)s [-h]\n"
        "       [--crash-after STEP | --crash-during STEP | --all |\n"
        "        --graphflow | --cyclic | --effect]\n"
        "       [--query TEXT] [--offline] [--nexum HOST:PORT] [--html FILE]",
        description=(__doc__ or "").partition("\n")[0],
        epilog="Models and keys are chosen as in demo.py (python demo.py --help). Exit code: 0 if every check of the "
        "run passed, 1 if one failed, 2 if the script could not run.",
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--crash-after",
        choices=CRASH_AFTER,
        metavar="STEP",
        help=f"kill worker 1 once this step is recorded: {', '.join(CRASH_AFTER)} (default: validate)",
    )
    where.add_argument(
        "--crash-during",
        choices=STEPS,
        metavar="STEP",
        help=f"kill worker 1 within this step, after its effect and before its record: {', '.join(STEPS)}",
    )
    where.add_argument("--all", action="store_true", help="run every crash point, one after the other")
    where.add_argument(
        "--graphflow",
        action="store_true",
        help="instead of the pipeline, interrupt an AutoGen GraphFlow and resume it: with save_state, and as a "
        "durable run",
    )
    where.add_argument("--cyclic", action="store_true", help="like --graphflow, with a GraphFlow that has a loop")
    where.add_argument(
        "--effect",
        action="store_true",
        help="instead of the pipeline, kill a worker between the effect of a tool that charges and its record, under "
        "three policies",
    )
    parser.add_argument("--query", default=QUERY, metavar="TEXT", help="the topic of the report (default: %(default)s)")
    parser.add_argument("--offline", action="store_true", help="run without a model key and without the web")
    add_nexum_option(parser, embedded=True)
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write the timeline as an HTML page")
    return parser


async def run(
    points: Sequence[CrashPoint], query: str, model: ModelChoice, nexum_address: str | None
) -> list[PipelineRun]:
    """Run a drill for each crash point. Return the drills' runs."""
    let_ctrl_c_cancel()
    runs: list[PipelineRun] = []
    with tempfile.TemporaryDirectory(prefix="nexum-crash-demo-", ignore_cleanup_errors=True) as folder:
        async with EmbeddedNexum(nexum_address) as nexum, NexumClient(nexum.address) as client:
            if nexum.is_published:
                say_what_is_lost(
                    nexum.address,
                    "it records each step's result, but no attempts, times or reasons of failures. So the timeline is "
                    "from the workers' log. Another worker gets a dead worker's step after 60 to 90 s",
                )
            effects = EffectLog(Path(folder) / "effects.jsonl")
            for point in points:
                if len(points) > 1:
                    say(f"\n[demo] Crash {point} ({len(runs) + 1} of {len(points)})")
                runs.append(await Drill(client, query, point, effects, offline=model.offline).run())
    return runs


def show(run: PipelineRun) -> None:
    """Print the run's timeline, remarks and report."""
    say(f"\n{timeline(run)}\n")
    for remark in remarks(run):
        say(remark)
    if run.report:
        say(f"\n{run.report.rstrip()}")


def verdict(run: PipelineRun) -> str:
    """Return one line about a run and its crash point."""
    shares = "; ".join(f"{worker.name} ran {', '.join(run.steps_of(worker)) or 'nothing'}" for worker in run.workers)
    repeated = ", ".join(
        f"{node.node_id} took {len(node.attempts)} attempts, its effect happened {effect_times(run, node)}"
        for node in run.repeated
    )
    wrong = problems(run)
    result = f"FAILED: {'; '.join(wrong)}" if wrong else "ok"
    return f"{run.point!s:<17} {result}: {shares}{f'; {repeated}' if repeated else ''}"


def finish(runs: Sequence[PipelineRun], html: Path | None, nexum_address: str | None) -> list[str]:
    """Print the results of the runs. Return a phrase for each failed check."""
    if len(runs) == 1:
        show(runs[0])
        where = f" --nexum {nexum_address}" if nexum_address else ""
        say(f"\n[demo] The whole record: python -m nexum_engine show {runs[0].execution.execution_id}{where}")
    else:
        say(f"\n[demo] {len(runs)} crash points, from {runs[0].source}:")
        for one in runs:
            say(verdict(one))
    if html is not None:
        html.write_text(page(runs), encoding="utf-8")
        say(f"[demo] Timeline as a page: {html.resolve()}")
    return [f"crash {one.point}: {problem}" for one in runs for problem in problems(one)]


async def charge(nexum_address: str | None) -> list[str]:
    """Kill workers between a charge and its record. Return a phrase for each policy that was not kept."""
    from support.charges.drill import HEADING, ChargeDrill
    from support.charges.tools import drill_workflow

    let_ctrl_c_cancel()
    name = secrets.token_hex(4)  # no other drill has this name
    with tempfile.TemporaryDirectory(prefix="nexum-crash-demo-", ignore_cleanup_errors=True) as folder:
        async with (
            EmbeddedNexum(nexum_address, owners=True) as nexum,
            NexumClient(nexum.address) as client,
            # Drop the session's own lines about progress: they would appear in the middle of the drill's output.
            Session(name, client=client, workflow=drill_workflow(name), tell=lambda _: None) as session,
        ):
            session.file = SessionFile(name, Path(folder))

            async def call(tool_name: str) -> tuple[str, str]:
                result = await session.call(tool_name, {"customer": "c-17", "cents": 990})
                return result.text, result.execution_id

            charged = await ChargeDrill(client, call, name, Path(folder)).run()
    say(f"\n[demo] Read from the ledger, and the attempts from the server's records:\n{HEADING}")
    for one in charged:
        say(one.row)
    return [one.problem for one in charged if one.problem]


def main(argv: list[str] | None = None) -> int:
    """Run the script from the command line. Return its exit code: 0 passed, 1 a check failed, 2 could not run."""
    parser = build_parser()
    args = parser.parse_args(argv)
    query = " ".join(argument_text(args.query).split())
    if not query:
        parser.error("the query is empty")
    if args.html is not None and (args.html.is_dir() or not args.html.resolve().parent.is_dir()):
        parser.error(f"--html {args.html}: give a file name in a folder that exists")
    if args.crash_during:
        points: Sequence[CrashPoint] = [CrashPoint(args.crash_during, within=True)]
    else:
        points = EVERY_POINT if args.all else [CrashPoint(args.crash_after or "validate")]
    say_after_ctrl_c("its server and workers were stopped")
    try:
        if args.effect:
            wrong = asyncio.run(charge(args.nexum))
        else:
            model = choose_model(os.environ, offline=args.offline)
            say(f"[demo] Model: {model.description}{OFFLINE_NOTE if model.offline else ''}")
            if args.graphflow or args.cyclic:
                wrong = asyncio.run(compare(cyclic=args.cyclic, model=model, nexum=args.nexum))
            else:
                wrong = finish(asyncio.run(run(points, query, model, args.nexum)), args.html, args.nexum)
    except DrillFailed as error:
        wrong = [str(error)]
    except (ModelChoiceError, NexumError) as error:
        complain(f"error: {error}")
        return 2
    for problem in wrong:
        complain(f"error: {problem}")
    return 1 if wrong else 0


if __name__ == "__main__":
    log_to(sys.stderr, logging.WARNING)
    say_what_is_logged("durable_autogen", "nexum_engine")
    run_script(main)
