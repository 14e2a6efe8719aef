"""The conversion of pages in child processes: its errors, its limits, and the end of the children."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from harness import ROOT
from planned_web import PlannedWeb, context
from processes import is_alive, stat, wait_until

from nexum_engine.errors import FinalError
from support.tools import Page, WebError, find_tool
from support.tools.web import converter
from support.tools.web.converter import CONVERSION_LIMIT, Converters

pytestmark = pytest.mark.every_python

URL = "https://example.org/page"
SLOW_PAGE = "<ul><li>a<br>b" * 35_000  # takes many seconds
linux_only = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")


def page(html: str = "<p>words</p>", *, status: int = 200) -> Page:
    return Page(URL, status, "text/html; charset=utf-8", html.encode())


def children_of(pid: int) -> set[int]:
    """Return the ids of a process's running children that convert pages."""
    found = set()
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdecimal() and int(stat(int(folder.name))[1]) == pid:
                # Between fork and exec, a child still has the command line of its parent. Don't count it yet.
                found |= {int(folder.name)} if b"converter" in (folder / "cmdline").read_bytes() else set()
        except (OSError, IndexError):
            continue
    return {pid for pid in found if is_alive(pid)}


@contextmanager
def new_children() -> Iterator[set[int]]:
    """Collect the children that this process starts during a `with`."""
    before, found = children_of(os.getpid()), set[int]()
    yield found
    found |= children_of(os.getpid()) - before


def test_a_page_and_its_errors_come_back_from_the_child() -> None:
    converters = Converters()
    assert converters.convert(page("<h1>Zürich</h1><p>5 €</p>")) == "# Zürich\n\n5 €"
    assert converters.convert(Page(URL, 200, "text/plain", "中文".encode())) == "中文"
    with pytest.raises(FinalError, match="HTTP 404 \\(there is no such page"):
        converters.convert(page(status=404))
    with pytest.raises(WebError, match="HTTP 503"):
        converters.convert(page(status=503))
    with pytest.raises(FinalError, match="holds no text"):
        converters.convert(page(""))


async def test_visit_webpage_converts_in_a_child() -> None:
    assert await find_tool("visit_webpage").run({"url": URL}, context(PlannedWeb(page=page()))) == "words"


@linux_only
def test_one_child_converts_one_page_after_the_other() -> None:
    converters = Converters()
    with new_children() as children:
        for number in range(5):
            assert converters.convert(page(f"<p>{number}")) == str(number)
    assert len(children) == 1


@linux_only
def test_no_child_is_kept_after_a_large_page() -> None:
    converters = Converters()
    with new_children() as children:
        assert converters.convert(page("<p>large</p>" + "<!-- -->" * 50_000)) == "large"
    assert children == set()


@linux_only
def test_page_that_takes_too_long_is_a_final_error_and_its_child_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    converters = Converters()
    converters.convert(page())  # the child has started, which may take seconds on a busy machine
    with monkeypatch.context() as patch:
        patch.setattr(converter, "CONVERSION_LIMIT", 0.5)
        with new_children() as children, pytest.raises(FinalError, match=r"took longer than 0\.5 s"):
            converters.convert(page(SLOW_PAGE))
    assert children == set()
    assert converters.convert(page()) == "words"


def test_a_slow_conversion_takes_no_time_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    converters = Converters()
    converters.convert(page())
    monkeypatch.setattr(converter, "CONVERSION_LIMIT", 0.5)
    before = time.process_time()
    with pytest.raises(FinalError, match=r"took longer"):
        converters.convert(page(SLOW_PAGE))
    assert time.process_time() - before < 0.25


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="the system has no limit of address space")
def test_page_that_takes_too_much_memory_is_a_final_error() -> None:
    converters = Converters(memory=200_000_000)
    with pytest.raises(FinalError, match=f"{URL}.*(takes too much memory|crashed)"):
        converters.convert(page("<p a b c d e f>x" * 60_000))
    assert converters.convert(page()) == "words"


def convert_and_kill(converters: Converters, number: int) -> None:
    """Convert a page in a new child, send the child a signal meanwhile, and raise the error of the conversion."""
    before = children_of(os.getpid())
    with ThreadPoolExecutor(1) as pool:
        conversion = pool.submit(converters.convert, page(SLOW_PAGE))
        wait_until(lambda: bool(children_of(os.getpid()) - before), "a child converts the page")
        (child,) = children_of(os.getpid()) - before
        os.kill(child, number)
        conversion.result()


@linux_only
def test_a_child_that_is_killed_may_be_replaced_by_a_retry() -> None:
    converters = Converters()
    with pytest.raises(WebError, match=rf"{URL}.*its conversion was killed \(exit code -9\)"):
        convert_and_kill(converters, signal.SIGKILL)
    assert converters.convert(page()) == "words"


@linux_only
@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT])
def test_page_that_crashes_a_child_is_a_final_error(number: int) -> None:
    with pytest.raises(FinalError, match=rf"converting it to text crashed \(exit code -{int(number)}\)"):
        convert_and_kill(Converters(), number)


@linux_only
def test_an_idle_child_that_died_is_replaced() -> None:
    converters = Converters()
    with new_children() as children:
        converters.convert(page())
    (child,) = children
    os.kill(child, signal.SIGKILL)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert converters.convert(page()) == "words"


@contextmanager
def converting_program(program: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program in which `converters`, `page` and `SLOW_PAGE` are defined."""
    begin = (
        "import sys, threading; from test_converter import SLOW_PAGE, page; from support.tools.web.converter import *;"
        "converters = Converters(); "
    )
    path = os.pathsep.join([str(ROOT), *(str(ROOT / "tests" / name) for name in ("support", "tools"))])
    with subprocess.Popen(
        [sys.executable, "-c", begin + program],
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as parent:
        yield parent


def the_child_of(parent: subprocess.Popen[bytes]) -> int:
    wait_until(lambda: bool(children_of(parent.pid)), "a child runs")
    (child,) = children_of(parent.pid)
    return child


@linux_only
def test_an_idle_child_ends_with_the_process_that_started_it() -> None:
    with converting_program("converters.convert(page()); print('idle', flush=True); sys.stdin.read()") as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"idle\n"
        child = the_child_of(parent)
        parent.kill()
    wait_until(lambda: not is_alive(child), "the child ended", timeout=10)


@linux_only
def test_a_busy_child_ends_with_the_process_that_started_it() -> None:
    with converting_program("converters.convert(page(SLOW_PAGE))") as parent:
        child = the_child_of(parent)
        parent.kill()
    wait_until(lambda: not is_alive(child), "the child ended", timeout=10)


@linux_only
def test_a_conversion_does_not_delay_the_end_of_its_process() -> None:
    program = (
        "threading.Thread(target=converters.convert, args=[page(SLOW_PAGE * 2)], daemon=True).start(); sys.stdin.read()"
    )
    with converting_program(program) as parent:
        child = the_child_of(parent)
        assert parent.stdin is not None
        parent.stdin.close()
        assert parent.wait(CONVERSION_LIMIT / 2) == 0
    wait_until(lambda: not is_alive(child), "the child ended", timeout=10)
