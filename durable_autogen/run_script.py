"""Run an unchanged script inside sessions."""

from __future__ import annotations

import argparse
import asyncio
import builtins
import functools
import hashlib
import importlib.util
import inspect
import logging
import os
import re
import runpy
import signal
import sys
import threading
import traceback
import types
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, TypeVar

from durable_autogen.budget_command import budget_of
from durable_autogen.errors import Parked
from durable_autogen.record.events import check_session_id
from nexum_engine.ctrl_c import INTERRUPTED, end_on_ctrl_c_again
from nexum_engine.errors import NexumError
from nexum_engine.policy import read_policies

_log = logging.getLogger(__name__)

T = TypeVar("T")
PARKED = 75
"""The exit code of a run that waits for a person (EX_TEMPFAIL of sysexits.h: try again later)."""
MAX_STEM = 40  # characters; a longer script name is cut in the session id


def default_session(script: Path, arguments: Sequence[str]) -> str:
    """Return the default session id of a script. Equal script paths and arguments give equal ids."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", script.stem).strip("-_") or "script"
    named = "\0".join([str(script.resolve()), *arguments])
    return f"{stem[:MAX_STEM]}-{hashlib.sha256(named.encode('utf-8', 'surrogatepass')).hexdigest()[:10]}"


def print_line(text: str, stream: TextIO) -> None:
    """Print a line at once. A character that the stream's encoding lacks becomes a question mark."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding), file=stream, flush=True)


def complain(text: str) -> None:
    """Print a line on standard error. Standard output is left to the script."""
    print_line(text, sys.stderr)


class _Sessions:
    """A wrapper that runs each main coroutine of a script (passed to `asyncio.run`, for example) in its own session."""

    def __init__(self, session: str, args: argparse.Namespace) -> None:
        self._session = session
        self._args = args
        self._budget = budget_of(args, "budget-")
        self._policies = read_policies(args.policies) if args.policies is not None else None
        self._process = os.getpid()
        self.count = 0
        """How many main coroutines the script has run."""
        self._is_inside = False

    def inside(self, main: Coroutine[Any, Any, T]) -> Coroutine[Any, Any, T]:
        """Return a coroutine that runs `main` in the next session. In a forked process, return `main`."""
        if os.getpid() != self._process:
            _log.warning("nothing is recorded in a process that the script forks: make the calls in a tool")
            return main
        self.count += 1
        name = self._session if self.count == 1 else f"{self._session}-{self.count}"
        return self._run(name, main)

    async def _run(self, name: str, main: Coroutine[Any, Any, T]) -> T:
        from durable_autogen.session import DurableSession

        try:
            session = DurableSession(
                name,
                nexum=self._args.nexum,
                on_drift=self._args.on_drift,
                on_unrecorded=self._args.on_unrecorded,
                budget=self._budget,
                policies=self._policies,
                park=self._args.park,
                approve=self._args.approve,
            )
            async with session:
                found = await main
            if not (session.recorder.live or session.recorder.replayed):
                _log.warning(
                    "session %s: nothing was recorded: the script called no model, tool or person through AutoGen",
                    name,
                )
            return found
        finally:
            main.close()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Run each main coroutine in its own session, for the length of a `with`."""
        replaced: list[tuple[Any, str, Any]] = []

        def replace(owner: Any, name: str, wrapper: Callable[[Any], Any]) -> None:
            original = getattr(owner, name)
            replaced.append((owner, name, original))
            setattr(owner, name, functools.wraps(original)(wrapper(original)))

        if sys.version_info >= (3, 11):
            replace(asyncio.Runner, "run", self._runner_run)
        else:
            replace(asyncio.runners, "run", self._run_function)
            replaced.append((asyncio, "run", asyncio.run))
            asyncio.run = asyncio.runners.run
        replace(asyncio.BaseEventLoop, "run_until_complete", self._run_until_complete)
        try:
            yield
        finally:
            for owner, name, original in reversed(replaced):
                setattr(owner, name, original)

    def _runner_run(self, original: Any) -> Any:
        def run(runner: Any, main: Any, **options: Any) -> Any:
            return original(runner, self.inside(main) if inspect.iscoroutine(main) else main, **options)

        return run

    def _run_function(self, original: Any) -> Any:
        def run(main: Any, **options: Any) -> Any:
            before, self._is_inside = self._is_inside, True
            try:
                return original(self.inside(main) if inspect.iscoroutine(main) else main, **options)
            finally:
                self._is_inside = before

        return run

    def _run_until_complete(self, original: Any) -> Any:
        def run_until_complete(loop: Any, future: Any) -> Any:
            # Only a coroutine that the script itself passes to this method is a main coroutine. asyncio also calls this
            # method, with tasks and with its own shutdown coroutines. Exclude the shutdown coroutines by name.
            is_main = (
                inspect.iscoroutine(future)
                and not self._is_inside
                and future.__qualname__.rpartition(".")[2] not in ("shutdown_asyncgens", "shutdown_default_executor")
            )
            return original(loop, self.inside(future) if is_main else future)

        return run_until_complete


def run_script(args: argparse.Namespace) -> int:
    """Run the script in sessions; return the exit code of the command."""
    script: Path = args.script
    if args.is_module:
        if not _is_module(str(script)):
            complain(f"error: there is no module {script}: check its name and this folder")
            return 2
    elif not script.is_file():
        complain(f"error: there is no script {script}: check the path")
        return 2
    if args.session is None:
        session = default_session(script, args.arguments)
        _log.info("session %s (from the script's path and arguments; choose another one with --session)", session)
    else:
        session = check_session_id(args.session)
    sys.argv = [str(script), *args.arguments]
    if not args.is_module:
        sys.path[0] = str(script.resolve().parent)
    sessions = _Sessions(session, args)
    with sessions.installed():
        try:
            if args.is_module:
                runpy.run_module(str(script), run_name="__main__", alter_sys=True)
            else:
                _run_as_main(script.resolve())
        except Parked as parked:
            # Don't repeat what the session waits for: it was logged when the wait began.
            _log.warning("session %s is parked: run the same command again after the decision", parked.session)
            return PARKED
        except NexumError as error:
            complain(f"error: {error}")
            return 2
        except KeyboardInterrupt:
            _end_interrupted("run the same command again to continue" if sessions.count else "")
            raise
        except Exception as error:  # noqa: BLE001 - any error of the script
            _print_traceback(error, script)
            return 1
    if not sessions.count:
        _log.warning(
            "nothing was recorded: the script ran no main coroutine with asyncio.run, asyncio.Runner or an asyncio "
            "event loop's run_until_complete"
        )
    return 0


def _is_module(name: str) -> bool:
    """Return whether Python finds a module. This imports the packages that contain the module, as `python -m` does."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ModuleNotFoundError, ValueError):
        return False


def _run_as_main(script: Path) -> None:
    """Run a script as `python SCRIPT` does.

    Don't use runpy: it makes sys.argv[0] equal to `__file__`. Python leaves sys.argv[0] as the user typed it.
    """
    module = types.ModuleType("__main__")
    module.__dict__.update(__file__=str(script), __builtins__=builtins, __cached__=None)
    before = sys.modules["__main__"]
    sys.modules["__main__"] = module
    try:
        # Without dont_inherit, this file's `from __future__ import annotations` would hold for the script, too.
        exec(compile(script.read_bytes(), str(script), "exec", dont_inherit=True), module.__dict__)
    finally:
        sys.modules["__main__"] = before


def _end_interrupted(next_step: str) -> None:
    """Print one line after Ctrl+C, in place of Python's traceback. If a thread would delay the end, end at once.

    Python waits at its end for threads, for example for one that reads a line from the terminal.
    """
    complain(f"\n[Nexum] interrupted{next_step and f'; {next_step}'}")
    sys.excepthook = lambda *_: None
    end_on_ctrl_c_again()  # for Ctrl+C while the interpreter ends
    if any(not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread()):
        sys.stdout.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if sys.platform != "win32":
            os.kill(os.getpid(), signal.SIGINT)  # so that a shell's loop ends, too
        os._exit(INTERRUPTED)


def _print_traceback(error: Exception, script: Path) -> None:
    """Print an error's traceback as `python SCRIPT` does, without the frames of durable_autogen and of runpy."""
    shown = traceback.TracebackException.from_exception(error)
    paths = [frame.filename for frame in shown.stack]
    begin = paths.index(str(script.resolve())) if str(script.resolve()) in paths else 0
    shown.stack = traceback.StackSummary.from_list(
        [frame for frame in shown.stack[begin:] if frame.filename not in (__file__, runpy.__file__, "<frozen runpy>")]
    )
    complain("".join(shown.format()).rstrip())
