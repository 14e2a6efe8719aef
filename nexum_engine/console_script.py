"""The command `nexum` of the installed package."""

from nexum_engine.ctrl_c import end_on_ctrl_c


def main() -> int:
    """Run `python -m nexum_engine` with this process's arguments; return the exit code."""
    end_on_ctrl_c()
    from nexum_engine.__main__ import main as nexum  # slow

    return nexum()
