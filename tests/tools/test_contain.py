"""run_contained: a tool ends at its time limit, and its failure ends or blocks nothing else."""

from __future__ import annotations

import asyncio
import contextvars
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from planned_web import context

from nexum_engine.errors import FinalError
from support.tools import Tool, ToolTimeout, WebError

ROOT = Path(__file__).resolve().parents[2]


def returning(value: object) -> Tool:
    def give() -> object:
        """Give."""
        return value

    return Tool.from_function(give)


def raising(error: BaseException, *, in_coroutine: bool) -> Tool:
    def fail() -> str:
        """Fail."""
        raise error

    async def fail_later() -> str:
        """Fail."""
        await asyncio.sleep(0)
        raise error

    return Tool.from_function(fail_later if in_coroutine else fail)


@pytest.mark.parametrize("in_coroutine", [False, True])
@pytest.mark.parametrize("error", [WebError("later"), FinalError("never"), ValueError("v"), TimeoutError("inner")])
async def test_tool_error_is_raised_unchanged(error: Exception, in_coroutine: bool) -> None:
    with pytest.raises(type(error)) as raised:
        await raising(error, in_coroutine=in_coroutine).run({}, context())
    assert raised.value is error


@pytest.mark.parametrize("in_coroutine", [False, True])
@pytest.mark.parametrize("error", [asyncio.CancelledError("c"), SystemExit(3), KeyboardInterrupt(), GeneratorExit()])
async def test_exception_that_would_end_the_worker_becomes_a_runtime_error(
    error: BaseException, in_coroutine: bool
) -> None:
    with pytest.raises(RuntimeError, match=f"raised {type(error).__name__}") as raised:
        await raising(error, in_coroutine=in_coroutine).run({}, context())
    assert raised.value.__cause__ is error


@pytest.mark.parametrize("in_coroutine", [False, True])
async def test_a_stop_iteration_becomes_an_ordinary_error(in_coroutine: bool) -> None:
    with pytest.raises(RuntimeError, match="StopIteration"):
        await raising(StopIteration(), in_coroutine=in_coroutine).run({}, context())


async def test_hung_tool_ends_at_its_limit_and_blocks_no_other_tool() -> None:
    release = threading.Event()
    started = threading.Semaphore(0)

    def hang() -> str:
        """Hang."""
        started.release()
        release.wait()
        return "late"

    hung = Tool.from_function(hang, time_limit=0.2)
    try:
        # Make more calls than any thread pool has threads.
        calls = [asyncio.create_task(hung.run({}, context())) for _ in range(100)]
        assert await returning("quick").run({}, context()) == "quick"
        errors = await asyncio.gather(*calls, return_exceptions=True)
        assert all(started.acquire(timeout=30) for _ in calls)
        assert {str(error) for error in errors} == {"hang took longer than its time limit of 0.2 s"}
        assert all(isinstance(error, ToolTimeout) for error in errors)
    finally:
        release.set()


async def test_an_async_tool_that_ignores_its_cancellation_ends_at_the_limit() -> None:
    release = asyncio.Event()

    async def stubborn() -> str:
        """Stay."""
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue
        return "late"

    with pytest.raises(ToolTimeout, match="stubborn took longer"):
        await Tool.from_function(stubborn, time_limit=0.1).run({}, context())
    release.set()


@pytest.mark.parametrize("in_coroutine", [False, True])
async def test_cancelling_the_waiting_task_cancels_it(in_coroutine: bool) -> None:
    started, release = threading.Event(), threading.Event()
    ended: list[str] = []

    def wait() -> str:
        """Wait."""
        started.set()
        release.wait()
        return ""

    async def wait_async() -> str:
        """Wait."""
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("cancelled")
        return ""

    waiting = asyncio.create_task(Tool.from_function(wait_async if in_coroutine else wait).run({}, context()))
    try:
        assert await asyncio.to_thread(started.wait, 30)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await asyncio.sleep(0)
        assert ended == (["cancelled"] if in_coroutine else [])
    finally:
        release.set()


async def test_the_callers_context_variables_are_seen_inside() -> None:
    variable = contextvars.ContextVar("variable", default="outside")

    def look() -> str:
        """Look."""
        return variable.get()

    variable.set("inside")
    assert await Tool.from_function(look).run({}, context()) == "inside"


def test_a_hung_tool_does_not_keep_the_process_from_ending() -> None:
    program = """
import asyncio, threading
from support.tools import Tool, ToolContext, ToolTimeout
from support.tools.web.live import LiveWeb

def hang() -> str:
    "Hang."
    threading.Event().wait()
    return ""

try:
    asyncio.run(Tool.from_function(hang, time_limit=0.1).run({}, ToolContext("key", 1, LiveWeb())))
except ToolTimeout as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "hang took longer than its time limit of 0.1 s\n"), done.stderr
