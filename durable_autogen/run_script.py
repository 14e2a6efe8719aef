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
import pkgutil
import re
import runpy
import signal
import sys
import threading
import traceback
import types
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from contextvars import Context
from io import BytesIO
from pathlib import Path
from typing import Any, TextIO, TypeVar

from durable_autogen.budget_command import budget_of
from durable_autogen.errors import Parked
from durable_autogen.record.activity import ThreadWork
from durable_autogen.record.events import check_session_id
from durable_autogen.record.place import current
from durable_autogen.record.threads import has_interpreters
from durable_autogen.record.while_open import replaced
from nexum_engine.ctrl_c import INTERRUPTED, end_on_ctrl_c_again
from nexum_engine.errors import NexumError
from nexum_engine.policy import read_policies

_log = logging.getLogger(__name__)

T = TypeVar("T")
PARKED = 75
"""The exit code of a run that waits for a person (EX_TEMPFAIL of sysexits.h: try again later)."""
MAX_STEM = 40  # characters; a longer script name is cut in the session id
MAX_FUNCTION = 8  # characters; a longer name of a thread's function is cut in the session id
_thread = threading.local()
"""Its attribute `name` is the part of a session's id that names the thread's function, such as `-ask-2`."""


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
        self._lock = threading.Lock()
        self.counts: Counter[str] = Counter()
        """How many main coroutines each thread of the script has run."""
        self.has_recorded = False
        """Whether a session has recorded or replayed a call."""
        self._functions: Counter[str] = Counter()
        """How often the script has given each function to a thread."""

    def _inside(self, main: Any) -> Any:
        """Return a coroutine that runs `main` in the thread's next session. Return `main` if it needs no session.

        A coroutine that a tool runs needs none: only the tool's result is recorded. With nest_asyncio, a coroutine of
        a session may run another one in the session's loop. asyncio itself passes tasks, its own shutdown coroutines,
        and a coroutine that another wrapper has returned.
        """
        if (
            not inspect.iscoroutine(main)
            or asyncio._get_running_loop() is not None
            or main.cr_code is _Sessions._run.__code__
            or main.__qualname__.rpartition(".")[2] in ("shutdown_asyncgens", "shutdown_default_executor")
            or _is_in_call()
        ):
            return main
        return self._run(self._next_name(), main)

    def _next_name(self) -> str:
        """Return the id of the thread's next session. In a forked process, return no id."""
        if os.getpid() != self._process:
            _log.warning("nothing is recorded in a process that the script forks: make the calls in a tool")
            return ""
        thread = _thread_name()
        with self._lock:
            self.counts[thread] += 1
            count = self.counts[thread]
        return f"{self._session}{thread}{f'-{count}' if count > 1 else ''}"

    async def _run(self, name: str, main: Coroutine[Any, Any, T]) -> T:
        if not name:
            return await main
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
            self.has_recorded |= bool(session.recorder.live_counts or session.recorder.replayed_counts)
            return found
        finally:
            main.close()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Run each main coroutine in its own session, for the length of a `with`."""
        with ExitStack() as stack:
            if sys.version_info >= (3, 11):
                stack.enter_context(replaced(asyncio.Runner, "run", self._method))
            else:
                for module in (asyncio, asyncio.runners):
                    stack.enter_context(replaced(module, "run", self._call))
            stack.enter_context(replaced(asyncio.BaseEventLoop, "run_until_complete", self._method))
            stack.enter_context(replaced(asyncio.BaseEventLoop, "run_forever", _watching))
            if importlib.util.find_spec("nest_asyncio") is not None:
                stack.enter_context(replaced(importlib.import_module("nest_asyncio"), "apply", self._apply))
            stack.enter_context(replaced(threading.Thread, "start", self._start))
            stack.enter_context(replaced(ThreadPoolExecutor, "submit", self._submit))
            yield

    def _call(self, original: Any) -> Any:
        """Return a wrapper of `asyncio.run`."""

        def run(main: Any, **options: Any) -> Any:
            return original(self._inside(main), **options)

        return run

    def _method(self, original: Any) -> Any:
        """Return a wrapper of `asyncio.Runner.run`, or of `run_until_complete` of an event loop."""

        def run(runner: Any, main: Any, **options: Any) -> Any:
            try:
                return original(runner, self._inside(main), **options)
            except asyncio.CancelledError:
                # Python's Runner raises no KeyboardInterrupt if the main task had caught another cancellation before.
                # In Python 3.11 and 3.12, a failed TaskGroup has the same effect.
                if getattr(runner, "_interrupt_count", 0):
                    raise KeyboardInterrupt from None
                raise

        return run

    def _apply(self, original: Any) -> Any:
        """Return a wrapper of `nest_asyncio.apply`, which replaces asyncio's functions that are wrapped here."""

        def apply(loop: Any = None) -> None:
            original(loop)
            kind: Any = type(loop or asyncio.get_event_loop())
            asyncio.run = self._call(asyncio.run)
            kind.run_until_complete = self._method(kind.run_until_complete)

        return apply

    # Threads reach `asyncio.run` in any order. So name a thread's sessions by the order in which the script starts the
    # threads, and gives functions to pools: that order is the same in the next run. Don't count what a tool starts: a
    # replay doesn't run the tool.

    def _name_thread(self, function: Any, args: Sequence[Any] = ()) -> str:
        # asyncio.to_thread and an open session pass the function to other functions, which call it in a context.
        while True:
            if isinstance(function, functools.partial):
                function, args = function.func, (*function.args, *args)
            elif isinstance(getattr(function, "__self__", None), (Context, ThreadWork)):
                function, args = args[0], args[1:]
            else:
                break
        name = getattr(function, "__qualname__", type(function).__qualname__).rpartition(".")[2]
        name = f"{_thread_name()}-{re.sub('[^A-Za-z0-9_]+', '', name)[:MAX_FUNCTION] or 'thread'}"
        with self._lock:
            self._functions[name] += 1
            return f"{name}-{self._functions[name]}"

    def _start(self, original: Any) -> Any:
        def start(thread: threading.Thread) -> None:
            if not _is_in_call():
                run = thread.run
                name = self._name_thread(getattr(thread, "_target", None) or type(thread))
                thread.run = lambda: _in_thread(name, run)  # type: ignore[method-assign]
            original(thread)

        return start

    def _submit(self, original: Any) -> Any:
        def submit(pool: ThreadPoolExecutor, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Any:
            if _is_in_call() or has_interpreters(pool):
                return original(pool, fn, *args, **kwargs)
            return original(pool, _in_thread, self._name_thread(fn, args), fn, *args, **kwargs)

        return submit


def _watching(original: Any) -> Any:
    """Return a wrapper of `run_forever` that warns of AutoGen calls without a session, while the loop runs."""

    def run_forever(loop: Any) -> None:
        if "autogen_core" not in sys.modules:  # don't import AutoGen for a script that doesn't need it
            original(loop)
            return
        from durable_autogen.autogen.entry_points import wrapped_classes

        with wrapped_classes():
            original(loop)

    return run_forever


def _thread_name() -> str:
    return getattr(_thread, "name", "")


def _is_in_call() -> bool:
    """Return whether the caller is part of a recorded call, such as a tool."""
    place = current.get()
    return place is not None and place.in_call


def _in_thread(name: str, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
    before = _thread_name()
    _thread.name = name
    try:
        return fn(*args, **kwargs)
    finally:
        _thread.name = before


def run_script(args: argparse.Namespace) -> int:
    """Run the script in sessions; return the exit code of the command."""
    script = Path(args.script)
    if args.is_module:
        if not _is_module(str(script)):
            complain(f"error: there is no module {script}: check its name and this folder")
            return 2
    elif not script.is_file() and not (script / "__main__.py").is_file():
        complain(f"error: there is no script {script}: check the path")
        return 2
    if args.session is None:
        session = default_session(script, args.arguments)
        _log.info("session %s (from the script's path and arguments; choose another one with --session)", session)
    else:
        session = check_session_id(args.session)
    sys.argv = [args.script, *args.arguments]
    if not args.is_module:
        # `python -m` puts the working folder there. With -P or -I it doesn't, and then Python adds no script's folder.
        if not getattr(sys.flags, "safe_path", sys.flags.isolated):
            sys.path[:1] = [] if _is_bundle(script) else [str(script.resolve().parent)]
        script = script.absolute()  # the script may change the folder
    sessions = _Sessions(session, args)
    with sessions.installed():
        try:
            if args.is_module:
                runpy.run_module(str(script), run_name="__main__", alter_sys=True)
            else:
                _run_as_main(script)
        except Parked as parked:
            # Don't repeat what the session waits for: it was logged when the wait began.
            _log.warning("session %s is parked: run the same command again after the decision", parked.session)
            return PARKED
        except NexumError as error:
            complain(f"error: {error}")
            return 2
        except KeyboardInterrupt:
            _end_interrupted("run the same command again to continue" if sessions.counts else "")
            raise
        except Exception as error:  # noqa: BLE001 - any error of the script
            _print_traceback(error)
            return 1
    if not sessions.has_recorded:
        why = (
            "called no model, tool or person through AutoGen, or only in sessions of its own"
            if sessions.counts
            else "ran no main coroutine with asyncio.run, asyncio.Runner or an asyncio event loop's run_until_complete"
        )
        _log.warning("nothing was recorded: the script %s", why)
    return 0


def _is_module(name: str) -> bool:
    """Return whether Python finds a module. This imports the packages that contain the module, as `python -m` does."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ModuleNotFoundError, ValueError):
        return False


def _is_bundle(script: Path) -> bool:
    """Return whether a path is a folder or a zip archive, as zipapp makes. Python runs the `__main__.py` inside."""
    return pkgutil.get_importer(str(script)) is not None


def _run_as_main(script: Path) -> None:
    """Run a script as `python SCRIPT` does.

    Use runpy only for folders and archives: it makes sys.argv[0] an absolute path. Python leaves sys.argv[0] as the
    user typed it.
    """
    if _is_bundle(script):
        runpy.run_path(str(script), run_name="__main__")
        return
    module = types.ModuleType("__main__")
    module.__dict__.update(__file__=str(script), __builtins__=builtins, __cached__=None)
    before = sys.modules["__main__"]
    sys.modules["__main__"] = module
    try:
        # Without dont_inherit, this file's `from __future__ import annotations` would hold for the script, too.
        source = script.read_bytes()
        code = pkgutil.read_code(BytesIO(source)) or compile(source, str(script), "exec", dont_inherit=True)
        exec(code, module.__dict__)
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


_HIDDEN = (__file__, runpy.__file__, "<frozen runpy>")
"""The files of the frames between this command and the script."""


def _print_traceback(error: Exception) -> None:
    """Print an error's traceback as `python SCRIPT` does: with the script's hook, and without our frames."""
    begin = error.__traceback__
    while begin is not None and begin.tb_frame.f_code.co_filename in _HIDDEN:
        begin = begin.tb_next
    if sys.excepthook is not sys.__excepthook__:
        sys.excepthook(type(error), error, begin)
        return
    shown = traceback.TracebackException(type(error), error, begin)
    shown.stack = traceback.StackSummary.from_list([frame for frame in shown.stack if frame.filename not in _HIDDEN])
    complain("".join(shown.format()).rstrip())
