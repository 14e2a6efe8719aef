"""Convert pages in child processes, so that a hostile page can't block the worker or use up its memory.

The deadline of a tool can't end a thread that is busy in a parser, but a process can be killed. A child is started when
it is first needed, converts one page at a time, and ends with the process that started it.
"""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, TypeAdapter, ValidationError

from nexum_engine.errors import FinalError
from support.tools.clean_text import shortened
from support.tools.web import Page, WebError

MAX_CHILDREN = max(4, os.cpu_count() or 1)  # at least four, so that a few slow pages don't keep others waiting
# The time limit of one conversion, in seconds. A page as large as a fetch allows takes 2 to 7 s. A page with tens
# of thousands of nested elements may take longer, because the parser walks through all open elements at each tag.
CONVERSION_LIMIT = 30.0
LARGE_PAGE = 200_000  # bytes; a child that converted a larger page is ended, because it would keep the memory
WAIT_LIMIT = 20.0  # seconds to wait for a free child
MEMORY_LIMIT = 1024 * 1024 * 1024  # bytes of address space; a page as large as a fetch allows takes about 300 MB

# Exit codes of a child that was killed from outside: SIGKILL, and TerminateProcess on Windows. Any other code
# means a crash, which the same page would cause again.
_KILLED = (-9, 1)
_ROOT = Path(__file__).resolve().parents[3]
_PAGE = TypeAdapter(Page)


class _Answer(BaseModel):
    """The result of a conversion: a page's text, or the words of an error."""

    text: str = ""
    error: str = ""
    may_retry: bool = False


class Converters:
    """Child processes that convert pages, MAX_CHILDREN at most."""

    def __init__(self, *, memory: int = MEMORY_LIMIT) -> None:
        self._memory = memory
        self._slots = threading.BoundedSemaphore(MAX_CHILDREN)
        self._idle: list[_Child] = []

    def convert(self, page: Page) -> str:
        """Return the result of `page_to_markdown`. Raises the same errors, and FinalError after the time limit."""
        if not self._slots.acquire(timeout=WAIT_LIMIT):
            raise WebError(f"{shortened(page.url)} could not be read: this worker is busy with other pages")
        try:
            child = self._idle_child() or _Child(self._memory)
            answer = child.convert(page)
            if len(page.body) <= LARGE_PAGE:
                self._idle.append(child)
            else:
                child.end()
        finally:
            self._slots.release()
        if answer.error:
            raise (WebError if answer.may_retry else FinalError)(answer.error)
        return answer.text

    def _idle_child(self) -> _Child | None:
        while True:
            try:
                child = self._idle.pop()
            except IndexError:
                return None
            if child.is_alive():
                return child


class _Child:
    """A running child process."""

    def __init__(self, memory: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import main; main()", str(memory)],
            cwd=_ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # Don't let Ctrl+C reach the child: it ends when its standard input closes.
            start_new_session=sys.platform != "win32",
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def end(self) -> int:
        """Kill the child and wait until it has ended. Return its exit code."""
        self._process.kill()
        return self._process.wait()

    def convert(self, page: Page) -> _Answer:
        """Return the child's answer. If there is none, end the child and raise an error."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        late = threading.Event()

        def give_up() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(CONVERSION_LIMIT, give_up)
        timer.daemon = True  # don't delay the end of this process
        timer.start()
        try:
            self._process.stdin.write(_PAGE.dump_json(page) + b"\n")
            self._process.stdin.flush()
            return _Answer.model_validate_json(self._process.stdout.readline())
        except (OSError, ValidationError) as error:
            code = self.end()
            name = shortened(page.url)
            if late.is_set():
                raise FinalError(
                    f"{name} was not read: converting it to text took longer than {CONVERSION_LIMIT:g} s"
                ) from error
            if code not in _KILLED:
                raise FinalError(f"{name} was not read: converting it to text crashed (exit code {code})") from error
            raise WebError(f"{name} could not be read: its conversion was killed (exit code {code})") from error
        finally:
            timer.cancel()


def main() -> None:
    """Convert pages from standard input, one per line, until standard input closes. Run this in a child process."""
    _limit_memory(int(sys.argv[1]))
    pages: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read_pages, args=(pages,), daemon=True).start()
    _answer(Page("https://example.org/", 200, "text/html", b"<p>text"))  # import the parsers before a page comes
    while True:
        answer = _answer(_PAGE.validate_json(pages.get()))
        sys.stdout.buffer.write(answer.model_dump_json().encode() + b"\n")
        sys.stdout.buffer.flush()


def _read_pages(pages: queue.SimpleQueue[bytes]) -> None:
    for line in sys.stdin.buffer:
        pages.put(line)
    os._exit(0)  # at once, even in the middle of a conversion: the process that needs the result has ended


def _answer(page: Page) -> _Answer:
    from support.tools.web.page import page_to_markdown  # imported here: only a child process needs the parsers

    try:
        return _Answer(text=page_to_markdown(page))
    except WebError as error:
        return _Answer(error=str(error), may_retry=True)
    except FinalError as error:
        return _Answer(error=str(error))
    except MemoryError:
        return _Answer(error=f"{shortened(page.url)} was not read: converting it to text takes too much memory")


def _limit_memory(size: int) -> None:
    # Python has no `resource` module on Windows. There, only the limit on a page's size limits the memory.
    if sys.platform != "win32":
        import resource

        with suppress(ValueError, OSError):  # a lower limit is in force, or the system has no such limit
            resource.setrlimit(resource.RLIMIT_AS, (size, size))
