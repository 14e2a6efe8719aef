"""Start a script, print its output and end it.

Printed text is safe on any terminal. A character that the terminal can't encode becomes a question mark, and control
characters from a model, a page or a file are escaped. Ctrl+C and a closed output pipe end a script quietly.
"""

from __future__ import annotations

import atexit
import errno
import gc
import io
import os
import signal
import sys
from contextlib import contextmanager, suppress

from nexum_engine.ctrl_c import INTERRUPTED, end_on_ctrl_c, end_on_ctrl_c_again, interrupt_on_ctrl_c
from nexum_engine.streams import in_words, open_closed_streams

# Until `begin_script` runs, Ctrl+C prints a traceback. So don't import typing here: it is slow.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import NoReturn, TextIO

# Map each control character (C0, DEL and C1, but not tab or newline) to its Python escape.
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"}


# ---- Printing --------------------------------------------------------------------------------------------------------


def printable(text: str) -> str:
    """Return the text with its control characters escaped, except newlines and tabs."""
    return text.replace("\r\n", "\n").translate(_CONTROLS)


def argument_text(argument: str) -> str:
    """Return a command-line argument as text. Decode bytes that Python left undecoded: a locale may not be UTF-8."""
    return argument.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def say(text: str) -> None:
    """Print one line and flush it. Raises BrokenPipeError, on every system, if standard output was closed."""
    _print(f"{text}\n", sys.stdout)


def say_piece(text: str) -> None:
    """Print a piece of a line and flush it. The next piece continues the line. All other output begins a new line."""
    _print(text, sys.stdout, continues=True)


def say_or_stop(text: str) -> None:
    """Print one line and flush it. If standard output was closed, stop this process instead of raising an error.

    If the line can't be written for another reason, such as a full disk, report the first such error and continue.
    """
    _print_or_stop(f"{text}\n", sys.stdout)


def complain(text: str) -> None:
    """Print one line to standard error and flush it. Raises BrokenPipeError if standard error was closed."""
    _print(f"{text}\n", sys.stderr)


def log_to(stream: TextIO, level: int, format: str = "%(message)s") -> None:
    """Print log messages and warnings to the stream. If the stream was closed, stop this process."""
    import logging

    logging.basicConfig(level=level, stream=_Log(stream), format=format, datefmt="%H:%M:%S")
    logging.captureWarnings(True)


def say_what_is_logged(*names: str) -> None:
    """Print the messages of these loggers, from level INFO on, to standard output, prefixed with `[Nexum]`."""
    import logging

    handler = logging.StreamHandler(_Log(sys.stdout))
    handler.setFormatter(logging.Formatter("[Nexum] %(message)s"))
    for name in names:
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
        logger.propagate = False


class _Log:
    """A stream for logging handlers that escapes control characters."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        # Don't raise here: the exception would surface in whatever code was logging.
        _print_or_stop(text, self._stream)


_line_is_open = False
"""Whether the last line on standard output has no end yet, because only pieces of it were printed."""


def _print(text: str, stream: TextIO, *, continues: bool = False) -> None:
    global _line_is_open
    if _line_is_open and not continues:
        text = f"\n{text}"  # also on standard error: both may go to one terminal
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        # One call of print, so that lines of several threads don't mix.
        print(printable(text).encode(encoding, "replace").decode(encoding), end="", file=stream, flush=True)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        # Raise BrokenPipeError on Windows too: there, a closed pipe is reported as EINVAL.
        raise BrokenPipeError(errno.EPIPE, "nobody reads the output") from error
    if stream is sys.stdout and text:
        _line_is_open = not text.endswith("\n")


_nobody_reads = False
_has_reported = False


def _print_or_stop(text: str, stream: TextIO) -> None:
    """Print the text. If the stream was closed, stop this process.

    If the process handles SIGTERM, raise that signal. Otherwise raise SIGINT, as Ctrl+C does. If the process ignores
    SIGINT, exit at once.
    """
    global _nobody_reads, _has_reported
    try:
        _print(text, stream)
        return
    except BrokenPipeError:
        _abandon_output()
        _nobody_reads = True
    except OSError as error:
        if not _has_reported:
            _has_reported = True
            with suppress(OSError):
                complain(f"error: {in_words(error)}; continuing without this output")
        return
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        signal.raise_signal(signal.SIGTERM)
    elif signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.raise_signal(signal.SIGINT)
    else:
        os._exit(1)


def _abandon_output() -> None:
    """Discard all further output, so that the interpreter doesn't report a closed pipe at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(nowhere, stream.fileno())


# ---- The life of a script --------------------------------------------------------------------------------------------


def begin_script(name: str) -> None:
    """Let Ctrl+C end the script at once until `run_script` is called. Call `begin_script` before the slow imports.

    `name` is the script's `__name__`. In an imported module `begin_script` does nothing.
    """
    if name != "__main__":
        return
    gc.disable()  # during the imports, until `run_script`: see `quick_imports`
    atexit.register(gc.freeze)  # don't search for garbage at exit: that takes up to 0.3 s
    open_closed_streams()
    end_on_ctrl_c()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A library may print a character that the terminal can't encode. `_print` handles this project's own text.
            stream.reconfigure(errors="replace")


@contextmanager
def quick_imports() -> Iterator[None]:
    """Collect no garbage within a `with` that only imports modules.

    Imports make many objects and keep nearly all of them, so collections free little. Without collections, the import
    of AutoGen takes a tenth less time.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


_after_ctrl_c = ""


def say_after_ctrl_c(text: str) -> None:
    """Set the text that `run_script` prints after Ctrl+C, such as how to continue."""
    global _after_ctrl_c
    _after_ctrl_c = text


def run_script(main: Callable[[], int]) -> NoReturn:
    """Run the script's main and exit with its code.

    After Ctrl+C, print the text of `say_after_ctrl_c` and exit with 130. Print a NexumError or an OSError in one line,
    and exit with 2 or 1. If the output was closed, exit with 1.
    """
    gc.enable()
    try:
        code = _exit_code(main)
        say_piece("")  # flush the buffer
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            complain(f"error: {in_words(error)}")  # for example, the disk is full
        _abandon_output()
        code = 1
    sys.exit(code)


def _exit_code(main: Callable[[], int]) -> int:
    from asyncio import CancelledError

    from nexum_engine.errors import NexumError

    began_here = interrupt_on_ctrl_c()
    try:
        return main()
    except SystemExit as error:  # raised by argparse
        return error.code if isinstance(error.code, int) else 1
    except NexumError as error:
        complain(f"error: {error}")
        return 2
    except (KeyboardInterrupt, CancelledError):
        if began_here:
            end_on_ctrl_c_again()
        if _nobody_reads:
            return 1
        if _after_ctrl_c:
            complain(f"\ninterrupted; {_after_ctrl_c}")
        return INTERRUPTED
    finally:
        if began_here:
            end_on_ctrl_c_again()  # for Ctrl+C while the interpreter ends


def let_ctrl_c_cancel() -> None:
    """Let Ctrl+C cancel the running task, as `asyncio.run` does since Python 3.11.

    Only Python 3.10 needs this function. There, `asyncio.run` cancels all tasks at Ctrl+C, and prints a traceback for
    each task that then ends with an error other than CancelledError.
    """
    if sys.version_info < (3, 11):
        import asyncio

        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        cancel = task.cancel

        def on_ctrl_c(number: int, _frame: object) -> None:
            signal.signal(number, signal.default_int_handler)  # a second Ctrl+C interrupts at once
            loop.call_soon_threadsafe(cancel)

        signal.signal(signal.SIGINT, on_ctrl_c)
