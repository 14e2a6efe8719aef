"""The texts of --help."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import ROOT
from processes import run_script

from durable_autogen.__main__ import build_parser as sessions_parser
from nexum_engine.__main__ import build_parser as engine_parser

SCRIPTS = ["demo.py", "submit_task.py", "worker.py", "crash_demo.py", "pipeline_worker.py"]


def with_commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Yield the parser and the parsers of its commands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from with_commands(command)


def check(text: str, columns: int) -> None:
    """Check that no line is too long, and that the usage names every option."""
    assert [line for line in text.splitlines() if len(line) > columns] == []
    usage, _, rest = text.partition("\n\n")
    listed = re.findall(r"^ +(?:-h, )?(--[a-z-]+)", rest, re.MULTILINE)
    assert "--help" in listed
    assert set(listed) - {"--help"} == set(re.findall(r"--[a-z-]+", usage))


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_of_script_fits_terminal(tmp_path: Path, script: str) -> None:
    code, text = run_script([str(ROOT / script), "--help"], tmp_path, {"COLUMNS": "80"}, forked=True)
    assert code == 0
    check(text, 80)


@pytest.mark.parametrize("columns", [80, 100])
@pytest.mark.parametrize("library", ["nexum_engine", "durable_autogen"])
def test_help_of_commands_fits_terminal(monkeypatch: pytest.MonkeyPatch, library: str, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    parsers = list(with_commands(engine_parser() if library == "nexum_engine" else sessions_parser()))
    assert len(parsers) > 6
    for parser in parsers:
        check(parser.format_help(), columns)
