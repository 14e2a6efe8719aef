"""The scripts and their console: how they begin, what they print, how they end.

What they print is safe on any terminal: a character that it doesn't know becomes a question mark, never a traceback,
and what came from a model, a page or a file can't control it. Ctrl+C and a pipe that nobody reads end a script quietly.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import sys

TYPE_CHECKING = False  # typing is slow to import, and until `begin_script` runs, Ctrl+C prints a traceback
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType
    from typing import NoReturn, TextIO

INTERRUPTED = 130  # the exit code after Ctrl+C, as shells have it

# All of C0 but tab and newline, DEL, and C1: shown as Python writes them.
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"}


# ---- Printing --------------------------------------------------------------------------------------------------------


def printable(text: str) -> str:
    """The text with its control characters shown instead of sent; newlines and tabs stay."""
    return text.replace("\r\n", "\n").translate(_CONTROLS)


def argument_text(argument: str) -> str:
    """A command line's argument as text: where the locale isn't UTF-8, it comes with undecoded bytes in it."""
    return argument.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def say(text: str, *, end: str = "\n") -> None:
    """Print one line at once. Raises BrokenPipeError once nobody reads standard output, on every system."""
    _print(text + end, sys.stdout)


def say_or_stop(text: str) -> None:
    """Print one line at once. If nobody reads standard output, stop this process instead of raising an error."""
    _print_or_stop(f"{text}\n", sys.stdout)


def complain(text: str) -> None:
    """Print one line to standard error, in the same way."""
    _print(f"{text}\n", sys.stderr)


def log_to(stream: TextIO, level: int, format: str = "%(message)s") -> None:
    """Print what is logged, and warnings, in the same way. A process whose log nobody reads is told to stop."""
    import logging

    logging.basicConfig(level=level, stream=_Log(stream), format=format, datefmt="%H:%M:%S")
    logging.captureWarnings(True)


def say_what_is_logged(*names: str) -> None:
    """Print what these loggers have for a person on standard output, with `[Nexum]` before it."""
    import logging

    handler = logging.StreamHandler(_Log(sys.stdout))
    handler.setFormatter(logging.Formatter("[Nexum] %(message)s"))
    for name in names:
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
        logger.propagate = False


class _Log:
    """What logging takes for a stream."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        # Don't raise here: the exception would surface in whatever code was logging.
        _print_or_stop(text, self._stream)


def _print(text: str, stream: TextIO) -> None:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        # In one piece, so that lines of several threads don't mix.
        print(printable(text).encode(encoding, "replace").decode(encoding), end="", file=stream, flush=True)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        # What Windows says of a pipe that nobody reads.
        raise BrokenPipeError(errno.EPIPE, "nobody reads the output") from error


_nobody_reads = False


def _print_or_stop(text: str, stream: TextIO) -> None:
    """Print, or stop this process: in good order if it has a way to, as a worker has, else as after Ctrl+C."""
    global _nobody_reads
    try:
        _print(text, stream)
        return
    except BrokenPipeError:
        _abandon_output()
        _nobody_reads = True
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        signal.raise_signal(signal.SIGTERM)
    elif signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.raise_signal(signal.SIGINT)
    else:
        os._exit(1)


def _abandon_output() -> None:
    """Nobody reads the output any more: what is left in its buffers goes nowhere, without a complaint at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(nowhere, stream.fileno())


# ---- The life of a script --------------------------------------------------------------------------------------------


def begin_script(name: str) -> None:
    """A script's first act, before its slow imports, with its `__name__`. From here to `run_script` Ctrl+C ends it.

    Does nothing in a module that is imported.
    """
    if name != "__main__":
        return
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # it isn't where Ctrl+C is to be ignored
        signal.signal(signal.SIGINT, _end_at_once)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # libraries print by themselves, too


def run_script(main: Callable[[], int], *, interrupted: str = "") -> NoReturn:
    """Run the script's main and exit with its code.

    After Ctrl+C that is 130, and `interrupted` says what it means; once nobody reads the output it is 1, as after an
    error of the operating system, which is told in one line.
    """
    try:
        code = _exit_code(main, interrupted)
        say("", end="")  # what is left in the buffer
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            complain(f"error: {error}")  # a full disk, under the output or elsewhere
        _abandon_output()
        code = 1
    sys.exit(code)


def _exit_code(main: Callable[[], int], interrupted: str) -> int:
    from asyncio import CancelledError

    began_here = signal.getsignal(signal.SIGINT) is _end_at_once
    try:
        if began_here:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return main()
    except SystemExit as error:  # argparse's
        return error.code if isinstance(error.code, int) else 1
    except (KeyboardInterrupt, CancelledError):
        if began_here:
            signal.signal(signal.SIGINT, _end_at_once)
        if _nobody_reads:
            return 1
        if interrupted:
            complain(f"\ninterrupted; {interrupted}")
        return INTERRUPTED
    finally:
        if began_here:
            signal.signal(signal.SIGINT, _end_at_once)  # the interpreter takes a moment to end


def _end_at_once(_number: int, _frame: FrameType | None) -> None:
    # Not an exception: an import may swallow it, or print it where it can't be raised.
    os._exit(INTERRUPTED)


def let_ctrl_c_cancel() -> None:
    """Ctrl+C cancels the running task, as `asyncio.run` does from Python 3.11 on.

    Before, it cancels every task there is, and prints a traceback for each that ends with another error.
    """
    if sys.version_info < (3, 11):
        import asyncio

        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        cancel = task.cancel

        def on_ctrl_c(number: int, _frame: FrameType | None) -> None:
            signal.signal(number, signal.default_int_handler)  # a second one interrupts
            loop.call_soon_threadsafe(cancel)

        signal.signal(signal.SIGINT, on_ctrl_c)
