"""The result of a submitted transition: who gets it, and what it does when a caller is cancelled."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from nexum_engine.store.submitted import Submitted


async def result_of(submitted: Submitted[str]) -> str:
    return await submitted


def new_submitted() -> Submitted[str]:
    return Submitted(asyncio.get_running_loop())


async def test_cancelled_caller_leaves_the_result_to_the_other_callers() -> None:
    submitted = new_submitted()
    gone, kept = asyncio.create_task(result_of(submitted)), asyncio.create_task(result_of(submitted))
    await asyncio.sleep(0)
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    submitted.settle("stored")
    assert await kept == await submitted == "stored"


async def test_effect_comes_before_the_callers_continue() -> None:
    submitted, seen = new_submitted(), list[str]()

    async def caller() -> None:
        seen.append(f"caller: {await submitted}")

    waiting = asyncio.create_task(caller())
    submitted.when_stored(lambda result: seen.append(f"effect: {result}"))
    await asyncio.sleep(0)
    submitted.settle("stored")
    await waiting
    assert seen == ["effect: stored", "caller: stored"]


async def test_effect_happens_without_a_caller() -> None:
    submitted, seen = new_submitted(), list[str]()
    submitted.when_stored(seen.append)
    only = asyncio.create_task(result_of(submitted))
    await asyncio.sleep(0)
    only.cancel()
    submitted.settle("stored")
    assert seen == ["stored"]


async def test_error_reaches_every_caller_and_has_no_effect() -> None:
    submitted, seen = new_submitted(), list[str]()
    submitted.when_stored(seen.append)
    early = asyncio.create_task(result_of(submitted))
    await asyncio.sleep(0)
    submitted.settle(ValueError("not stored"))
    for caller in (early, submitted):
        with pytest.raises(ValueError, match="not stored"):
            await caller
    assert seen == []


async def test_effect_with_a_bug_does_not_stop_the_next_effect() -> None:
    submitted, seen, logged = new_submitted(), list[str](), list[dict[str, Any]]()
    asyncio.get_running_loop().set_exception_handler(lambda _, context: logged.append(context))

    def has_a_bug(_: str) -> None:
        raise RuntimeError("a bug")

    submitted.when_stored(has_a_bug)
    submitted.when_stored(seen.append)
    submitted.settle("stored")
    assert (seen, [str(one["exception"]) for one in logged]) == (["stored"], ["a bug"])
    assert await submitted == "stored"
