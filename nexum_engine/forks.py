"""What happens to the objects of a process in the processes that are forked from it."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable


def in_forked_process(function: Callable[[], None]) -> Callable[[], None]:
    """Call the decorated function at the beginning of each process that is forked from this one."""
    if hasattr(os, "register_at_fork"):  # not on Windows
        os.register_at_fork(after_in_child=function)
    return function


def never_free(value: object) -> None:
    """Keep an object in memory until the process ends. To free it would touch what belongs to the parent process."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))
