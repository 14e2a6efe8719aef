"""Add the command-line options that several scripts share."""

from __future__ import annotations

import argparse
import os

from nexum_engine.connection import DEFAULT_ADDRESS


def add_nexum_option(parser: argparse.ArgumentParser, *, embedded: bool = False) -> None:
    """Add `--nexum`, the server's address. Set `embedded` if the script opens the database when no server answers."""
    parser.add_argument(
        "--nexum",
        metavar="HOST:PORT",
        default=os.environ.get("NEXUM_ADDRESS") or None,
        help="address of a running server (default: $NEXUM_ADDRESS, else the server of this folder's database, else "
        f"{DEFAULT_ADDRESS}{', else this program opens the database itself' if embedded else ''})",
    )


def add_until_stdin_closes_option(parser: argparse.ArgumentParser) -> None:
    """Add `--until-stdin-closes`. With this option a child process ends when its parent dies."""
    parser.add_argument(
        "--until-stdin-closes", action="store_true", help="end when the process that holds standard input ends"
    )
