"""README.md and the docs: the named files exist, and the scripts accept the commands."""

from __future__ import annotations

import re
import shlex
from argparse import ArgumentParser, _SubParsersAction
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from harness import ROOT
from processes import run_script

import crash_demo
import demo
from durable_autogen.__main__ import build_parser as durable_parser
from nexum_engine.__main__ import build_parser as engine_parser
from support.demo_options import build_parser as build_demo_parser

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
PARSERS: dict[str, Callable[[], ArgumentParser]] = {
    "python demo.py": partial(build_demo_parser, "", demo.QUESTION),
    "python crash_demo.py": crash_demo.build_parser,
    "python -m nexum_engine": engine_parser,
    "python -m durable_autogen": durable_parser,
}


def test_table_of_files_names_every_script_and_code_folder() -> None:
    table = README.partition("## Settings and files")[2].partition("\n## ")[0]
    named: set[str] = set()
    for row in table.splitlines():
        if row.startswith("|"):
            named |= {name.rstrip("/") for name in re.findall(r"`([\w/.]+)`", row.split("|")[1])}
    code = {path.name for path in ROOT.glob("*.py")}
    code |= {path.parent.name for path in ROOT.glob("*/*.py") if not path.parent.name.startswith(".")}
    assert named == code | {"proto"}


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in headings}


def leads_somewhere(page: Path, link: str) -> bool:
    """Return whether a link's file exists and has the heading that the link names."""
    path, _, anchor = link.partition("#")
    target = page.parent / path if path else page
    return target.exists() and (not anchor or anchor in anchors(target))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_to_a_file_has_a_target(page: Path) -> None:
    links = [one for one in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")) if "://" not in one]
    assert [one for one in links if not leads_somewhere(page, one)] == []


def test_index_links_every_page() -> None:
    for folder in (ROOT / "docs", ROOT / "docs" / "decisions"):
        index = (folder / "README.md").read_text(encoding="utf-8")
        assert [page.name for page in folder.glob("*.md") if page.name != "README.md" and page.name not in index] == []


def test_every_file_that_architecture_names_exists() -> None:
    named = set(re.findall(r"`([\w/]+\.(?:py|sql|proto)|[\w/]+/)`", ARCHITECTURE))
    places = [ROOT, ROOT / "nexum_engine", ROOT / "durable_autogen"]
    assert len(named) > 20
    assert [one for one in sorted(named) if not any((place / one).exists() for place in places)] == []


def test_architecture_lists_every_promise_with_its_tests() -> None:
    rows = re.findall(r"^\| (G\d+) \| .+ \| .+ \| \[test_.+\) \|$", ARCHITECTURE, re.MULTILINE)
    assert rows == [f"G{number}" for number in range(1, 17)]


def commands() -> list[str]:
    """Return the commands of all code blocks. Leave out the variables before a command, and the comment after it."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            for line in block.splitlines():
                for command in re.split(r"&&|;", line.partition(" #")[0]):
                    found.append(re.sub(r"^.*?(\.venv[/\\]\S*)?python (?=\S)", "python ", command.strip()))
    return [one for one in found if one.startswith("python ") and "\\" not in one]


def test_every_documented_command_is_accepted_by_its_script() -> None:
    taken = set()
    for command in commands():
        script = next((one for one in PARSERS if command.startswith(one)), None)
        if script is not None:
            PARSERS[script]().parse_args(shlex.split(command.removeprefix(script)))
            taken.add(script)
        else:
            path = command.split()[1]
            assert path in ("-m", "-c") or (ROOT / path).is_file(), command
    assert taken == set(PARSERS)


def durable_run_help() -> str:
    """Return the help of `python -m durable_autogen run`, which lists the options of `run`."""
    return run_script(["-m", "durable_autogen", "run", "--help"], ROOT, forked=True)[1]


def test_every_documented_option_exists(tmp_path: Path) -> None:
    scripts = ["demo.py", "crash_demo.py", "worker.py", "pipeline_worker.py"]
    helps = [run_script([str(ROOT / script), "--help"], tmp_path, forked=True)[1] for script in scripts]
    known = set(re.findall(r"--[a-z][a-z-]+", "\n".join([*helps, engine_parser().format_help(), durable_run_help()])))
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) - known == set()


def options(parser: ArgumentParser) -> Iterator[str]:
    """Yield the long options of a command and of its subcommands."""
    for action in parser._actions:
        yield from (name for name in action.option_strings if name.startswith("--"))
        if isinstance(action, _SubParsersAction):
            for command in action.choices.values():
                yield from options(command)


def test_every_option_is_on_a_page() -> None:
    pages = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    known = {name for build in PARSERS.values() for name in options(build())}
    # Errors name --else-free-port. The options of `run` for a budget are those of `budget`, with another beginning.
    known = {name.replace("--budget-", "--") for name in known} - {"--help", "--version", "--else-free-port"}
    assert [name for name in sorted(known) if not re.search(rf"(?<![\w-]){name}(?![\w-])", pages)] == []
