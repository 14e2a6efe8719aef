"""The command `nexum` of the installed package."""

import atexit
import gc

from nexum_engine.ctrl_c import end_on_ctrl_c


def main() -> int:
    """Run `python -m nexum_engine` with this process's arguments; return the exit code."""
    end_on_ctrl_c()
    atexit.register(gc.freeze)  # don't search for garbage at exit: that takes 0.1 s
    from nexum_engine.__main__ import main as nexum  # slow

    return nexum()
