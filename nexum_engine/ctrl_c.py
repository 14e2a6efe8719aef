"""Let Ctrl+C end a program quietly while it imports its modules.

Python's own handler raises KeyboardInterrupt: during an import, that prints a traceback, or the import swallows it.
Until `end_on_ctrl_c` is called, Ctrl+C does the same, so this module imports nothing that is slow.
"""

import os
import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType

INTERRUPTED = 130
"""The exit code after Ctrl+C, as in shells."""


def end_on_ctrl_c() -> None:
    """Let Ctrl+C end this process at once. Call this function before the slow imports."""
    # Replace only Python's default handler. Another handler means that the parent process wants Ctrl+C to be ignored.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end_at_once)


def interrupt_on_ctrl_c() -> bool:
    """Undo `end_on_ctrl_c`: let Ctrl+C raise KeyboardInterrupt. Return whether there was something to undo."""
    if signal.getsignal(signal.SIGINT) is not _end_at_once:
        return False
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return True


def end_on_ctrl_c_again() -> None:
    """Let Ctrl+C end this process at once again. Call this function before the interpreter ends."""
    signal.signal(signal.SIGINT, _end_at_once)


def _end_at_once(_number: int, _frame: "FrameType | None") -> None:
    # Don't raise an exception: the import that is interrupted may swallow the exception.
    os._exit(INTERRUPTED)
