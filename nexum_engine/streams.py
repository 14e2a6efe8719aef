"""Replace closed standard streams by open ones, and explain the errors that end a program."""

from __future__ import annotations

import os
import sys

NO_WORKING_FOLDER = "the working folder was deleted: change to another folder, and run the command again"


def open_closed_streams() -> None:
    """Open the null device in the place of each standard stream that the caller has closed, as with `>&-`.

    Call this function before other files are opened. Otherwise the next file would get the number of the closed stream,
    and whatever a library prints would be written into that file.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", errors="replace", closefd=False))  # noqa: SIM115


def in_words(error: OSError) -> str:
    """Return the message of an error that ends a program. An error without a file's name concerns the output."""
    if error.filename is None and isinstance(error, FileNotFoundError):
        return NO_WORKING_FOLDER  # os.getcwd raised it
    if error.filename is None and error.strerror is not None:
        return f"the output can't be written: {error.strerror}"
    return str(error)
