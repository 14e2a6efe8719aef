"""Run durable programs in separate processes, kill them at random, and check their records.

python tests/durable_runs.py --long            100 runs of each shape
python tests/durable_runs.py --runs 5 fan_out
python tests/durable_runs.py --runs 300 random --uvloop
python tests/durable_runs.py --without-server
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent / "support"))  # as in pytest's settings

from harness import ROOT, environment, nexum_server, running
from openai_server import OpenAIServer, Reply

from durable_autogen.record.events import Event, Kind, Returned, read_record
from nexum_engine.client import NexumClient
from nexum_engine.embedded import EmbeddedNexum
from nexum_engine.location import database_url
from nexum_engine.options import count

SHAPES = (
    "single",
    "own",
    "round_robin",
    "selector",
    "swarm",
    "sequential",
    "cyclic",
    "fan_out",
    "person",
    "magentic",
    "random",
)
PARALLEL = {"fan_out": 3, "random": 5}  # the number of agents that work in parallel; one in all other shapes
MAX_KILLS = 4
MAX_CALLS_AT_ONCE = 2  # tool calls in one reply
MAX_LENGTH = 300.0  # seconds that a program may run
TAKE_OVER = 1.0  # seconds, roughly, until the server notices that the killed run is dead, and the next run can begin


class RandomModel:
    """A model that answers each request with new words, and keeps requests and answers."""

    def __init__(self) -> None:
        self.said: list[tuple[str, str, str]] = []
        """Model, request and reply of each call, in the order of the replies."""
        self._lock = threading.Lock()

    def __call__(self, body: dict[str, Any]) -> Reply:
        time.sleep(random.uniform(0.01, 0.08))
        reply = self._reply(body)
        with self._lock:
            answer = json.dumps([reply.text, [arguments for _, arguments in reply.calls]])
            self.said.append((body["model"], json.dumps(body, sort_keys=True), answer))
        return reply

    def _reply(self, body: dict[str, Any]) -> Reply:
        model, words = body["model"], f"{body['model']} {random.random()}"
        offered = [tool["function"]["name"] for tool in body.get("tools", [])]
        if model.endswith("selector"):
            return Reply(f"{random.choice('abc')} {random.random()}")
        if "is_request_satisfied" in body["messages"][-1]["content"]:
            return Reply(_ledger(words))
        handoffs = [name for name in offered if name.startswith("transfer_to_")]
        if handoffs and random.random() < 0.5:
            return Reply(calls=[("note", {"text": words}), (handoffs[0], {})])
        helpers = [name for name in offered if name.startswith("helper_")]
        if helpers and random.random() < 0.3:
            return Reply(calls=[(helpers[0], {"task": words})])
        used = sum(message["role"] == "tool" for message in body["messages"])
        if "note" in offered and used < 4 and random.random() < 0.6:
            text = f"fail {words}" if random.random() < 0.2 else words
            if random.random() < 0.2:
                return Reply(calls=[("note", {"text": text}), ("note", {"text": text})])  # two equal calls, on purpose
            return Reply(calls=[("note", {"text": f"{text} {n}"}) for n in range(random.choice((1, 1, 2)))])
        return Reply(words + (" DONE" if random.random() < 0.5 else ""))


def _ledger(words: str) -> str:
    said = {"reason": words, "answer": False}
    return json.dumps(
        {
            "is_request_satisfied": said,
            "is_in_loop": said,
            "is_progress_being_made": {"reason": words, "answer": True},
            "next_speaker": {"reason": words, "answer": random.choice("ab")},
            "instruction_or_question": {"reason": words, "answer": words},
        }
    )


@dataclass(frozen=True)
class Programs:
    """A starter of durable programs. It forks them, so that each start is quick."""

    env: Mapping[str, str]
    folder: Path

    def run(self, argv: Sequence[str], *, kill_after: float | None = None) -> tuple[int, str]:
        """Run a program; return its exit code (negative for a signal) and output."""
        program = str(ROOT / "tests" / "programs" / "durable_program.py")
        with running([program, *argv], cwd=self.folder, env=self.env, forked=True) as process:
            killer = None
            if kill_after is not None:
                killer = threading.Timer(kill_after, _kill, (process.popen.pid,))
                killer.start()
            code = process.wait(MAX_LENGTH)
            if killer is not None:
                killer.cancel()
                killer.join()
        return code, process.output


def _kill(pid: int) -> None:
    # The program may have just ended. Its id is safe to use: the system doesn't soon give it to another process.
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


@dataclass
class Bench:
    """A model server, a starter of programs and a folder."""

    env: Mapping[str, str]
    """The variables that name the server or the database."""
    model_url: str
    model: RandomModel
    programs: Programs
    folder: Path
    _lengths: dict[str, float] = field(default_factory=dict)

    def arguments(self, shape: str, session: str) -> list[str]:
        """Return a program's command line."""
        return [shape, session, self.model_url, str(self.folder / f"{session}.log")]

    def length(self, shape: str) -> float:
        """Return how many seconds a run of this shape takes without kills. The times of the kills depend on this.

        Measure two runs, and return the shorter time: a kill after the end of a run tests nothing.
        """
        if shape not in self._lengths:
            self._lengths[shape] = min(self._measured(shape, number) for number in (1, 2))
        return self._lengths[shape]

    def ended_early(self, shape: str, seconds: float) -> None:
        """Remember that a run of this shape took only `seconds`.

        If the machine was busier during the first measurement, the measured length was too long.
        """
        self._lengths[shape] = min(self.length(shape), seconds)

    def _measured(self, shape: str, number: int) -> float:
        begun = time.monotonic()
        code, output = self.programs.run(self.arguments(shape, f"length-{shape.replace('_', '-')}-{number}"))
        assert code == 0, output
        return time.monotonic() - begun


@contextmanager
def bench(folder: Path, *, without_server: bool = False) -> Iterator[Bench]:
    """Yield a bench for the length of a `with`. Its programs use one server, or open the database themselves."""
    model = RandomModel()
    with ExitStack() as stack:
        if without_server:
            env = {"DATABASE_URL": database_url(folder / "own.db")}
        else:
            env = {"NEXUM_ADDRESS": stack.enter_context(nexum_server(folder)).address}
        http = stack.enter_context(OpenAIServer(model))
        yield Bench(env, http.base_url, model, Programs(env, folder), folder)


@dataclass
class Verdict:
    """The kills, repetitions and problems of one session."""

    kills: int = 0
    calls_repeated: int = 0
    effects_repeated: int = 0
    problems: list[str] = field(default_factory=list)


def run_killed(bench: Bench, shape: str, session: str, kills: int, *options: str) -> Verdict:
    """Run a session, kill it up to `kills` times, run it to its end, and run it again; return the verdict."""
    verdict = Verdict()
    log = bench.folder / f"{session}.log"
    argv = [*bench.arguments(shape, session), *options]
    length = bench.length(shape)
    bench.model.said.clear()
    output = ""
    for number in range(kills + 1):
        moment = random.uniform(0, length) + (TAKE_OVER if number else 0)
        begun = time.monotonic()
        code, output = bench.programs.run(argv, kill_after=moment if number < kills else None)
        if code == 0:
            if not verdict.kills:
                bench.ended_early(shape, time.monotonic() - begun)
            break
        if code != -signal.SIGKILL:
            verdict.problems.append(f"exit {code}: {output}")
            return verdict
        verdict.kills += 1
    said = list(bench.model.said)
    noted = log.read_text().splitlines() if log.exists() else []
    code, again = bench.programs.run(argv)
    with patch.dict(os.environ, environment(bench.env), clear=True):
        events = asyncio.run(_events(session))
    parallel = PARALLEL.get(shape, 1)
    check = verdict.problems.append
    if code != 0 or _transcript(again) != _transcript(output):
        check(f"the replay of a finished session differs: {again}")
    if len(bench.model.said) != len(said) or (log.read_text().splitlines() if log.exists() else []) != noted:
        check("the replay of a finished session made live calls")
    verdict.calls_repeated = _check_calls(said, events, verdict.kills * parallel, check)
    verdict.effects_repeated = _check_effects(
        noted, events, verdict.kills * parallel * MAX_CALLS_AT_ONCE, _transcript(output), check
    )
    return verdict


async def _events(session: str) -> list[Event]:
    async with EmbeddedNexum(None, owners=True) as nexum, NexumClient(nexum.address) as client:
        record = await read_record(client, session)
    assert not record.unfinished
    return record.events


def _transcript(output: str) -> str:
    return next((line for line in output.splitlines() if line.startswith("TRANSCRIPT ")), f"none: {output}")


def _check_calls(said: Sequence[tuple[str, str, str]], events: Sequence[Event], allowed: int, check: Any) -> int:
    """Check that replies were recorded once and in order, and that calls in flight were retried unchanged."""
    recorded: dict[str, list[str]] = defaultdict(list)
    models: dict[str, str] = {}
    """The model of each agent. Only the recorded event of an agent's first request names the model."""
    for event in events:
        if event.kind is Kind.REPLY:
            assert isinstance(event.content, Returned)
            content = event.content.value["content"]
            calls = [] if isinstance(content, str) else [json.loads(call["arguments"]) for call in content]
            text = content.strip() if isinstance(content, str) else ""
            answer = json.dumps([text, calls])
            models.setdefault(event.agent, event.request.get("model", ""))
            recorded[models[event.agent]].append(answer)
    repeated = 0
    for model in {model for model, _, _ in said} | set(recorded):
        left = list(recorded[model])
        unrecorded: list[str] = []
        for _, request, answer in (one for one in said if one[0] == model):
            if left and answer == left[0]:
                if unrecorded and set(unrecorded) != {request}:
                    check(f"{model}: a call in flight was retried with another prompt")
                unrecorded = []
                left.pop(0)
            else:
                unrecorded.append(request)
                repeated += 1
        if left:
            check(f"{model}: the server never sent these recorded replies, or not in this order: {left}")
        if unrecorded:
            check(f"{model}: the server's last replies are not recorded: {unrecorded}")
    if repeated > allowed:
        check(f"{repeated} calls were made twice, {allowed} could be in flight")
    return repeated


def _check_effects(noted: Sequence[str], events: Sequence[Event], allowed: int, transcript: str, check: Any) -> int:
    """Check that exactly the recorded tool calls were executed: each once, or again if a kill interrupted it."""
    asked: Counter[str] = Counter()
    for event in events:
        if event.kind is Kind.TOOL:
            if "text" in (arguments := json.loads(event.request["arguments"])):  # a handoff has no `text`
                asked[f"{event.agent.rpartition('/')[2]} {arguments['text']}"] += 1
        elif event.kind is Kind.INPUT:
            asked["person asked"] += 1
    done = Counter(noted)
    for effect in asked:
        if done[effect] < asked[effect]:
            check(f"recorded and never executed: {effect}")
    repeated = sum((done - asked).values())
    unknown = [effect for effect in done if effect not in asked]
    if unknown:
        check(f"executed and not recorded: {unknown}")
    if repeated > allowed:
        check(f"{repeated} effects were repeated, {allowed} could be in flight")
    for effect in asked:
        if effect != "person asked" and json.dumps(effect.partition(" ")[2])[1:-1] not in transcript:
            check(f"not in the transcript: {effect}")
    return repeated


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "shapes", nargs="*", default=list(SHAPES), metavar="SHAPE", help=f"(default: {' '.join(SHAPES)})"
    )
    parser.add_argument("--long", action="store_true", help="100 runs of each shape")
    parser.add_argument("--runs", type=count(), default=3, help="runs of each shape (default: %(default)s)")
    parser.add_argument("--uvloop", action="store_true", help="run the programs on uvloop")
    parser.add_argument("--without-server", action="store_true", help="let each program open the database itself")
    args = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as name, bench(Path(name), without_server=args.without_server) as found:
        for shape in args.shapes:
            begun, totals = time.monotonic(), Counter[str]()
            for number in range(100 if args.long else args.runs):
                options = ["--stream"] if number % 3 == 2 else []
                options += ["--uvloop"] if args.uvloop else []
                session = f"{shape.replace('_', '-')}-{number}"
                verdict = run_killed(found, shape, session, random.randint(1, MAX_KILLS), *options)
                totals.update(runs=1, kills=verdict.kills, failed=bool(verdict.problems))
                totals.update(calls_repeated=verdict.calls_repeated, effects_repeated=verdict.effects_repeated)
                for problem in verdict.problems:
                    print(f"{session}: {problem}", flush=True)
            failed += totals["failed"]
            print(f"{shape}: {dict(totals)} in {time.monotonic() - begun:.0f} s", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
