"""Lists of executions: each combination of filters, sessions as one item, and the plans of the queries."""

from __future__ import annotations

import itertools
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from nexum_engine.clock import ManualClock
from nexum_engine.errors import InvalidRequest
from nexum_engine.records import ExecutionStatus, SessionSummary
from nexum_engine.store import Store, executions, leases, listing, open_store, reading, tasks

ONE_NODE = '{"nodes": {"a": {"type": "EFFECT"}}}'
ATTRIBUTES: tuple[dict[str, str], ...] = ({}, {"customer": "c-1"}, {"customer": "c-2", "env": "prod"}, {"env": "prod"})


@pytest.fixture
async def store(database_url: str, clock: ManualClock) -> AsyncIterator[Store]:
    store = await open_store(database_url, clock)
    for workflow_id in ("w", "v", "run", "event"):
        await store.run(executions.register_workflow, workflow_id, workflow_id, ONE_NODE)
    yield store
    await store.close()


async def start(store: Store, workflow_id: str = "w", key: str = "", attributes: dict[str, str] | None = None) -> str:
    run = store.run(executions.start_execution, workflow_id, workflow_id, "{}", key, attributes=attributes)
    return (await run).execution_id


async def end(store: Store, workflow_id: str, status: str) -> None:
    """End the execution that was started last, unless `status` is RUNNING."""
    task = (await store.run(tasks.claim, "worker", (workflow_id,), 2**40, 30_000, True)).task
    assert task is not None
    if status == "COMPLETED":
        await store.run(tasks.complete_task, task.task_id, "1")
    elif status == "FAILED":
        await store.run(tasks.fail_task, task.task_id, "broken", True)
    elif status == "CANCELLED":
        await store.run(executions.cancel_execution, task.execution_id)


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "rare", [pytest.param(0, id="common"), pytest.param(1000, id="rare", marks=pytest.mark.both_stores)]
)
async def test_each_combination_of_filters_finds_what_matches(
    store: Store, clock: ManualClock, monkeypatch: pytest.MonkeyPatch, rare: int
) -> None:
    monkeypatch.setattr(listing, "_RARE", rare)
    monkeypatch.setattr(listing, "_CANDIDATES", 5)
    began_ms = clock.now_ms()
    statuses = itertools.cycle(ExecutionStatus.__members__)
    starts = itertools.product(ATTRIBUTES, ("w", "v"), ("", "k/", "l"))
    for number, (attributes, workflow_id, key) in enumerate(starts):
        await start(store, workflow_id, f"{key}{number}" if key else "", attributes)
        await end(store, workflow_id, next(statuses))
        clock.advance(10)
    everything = await store.run(listing.list_executions, "", "", 1000)
    assert len(everything) == 24
    assert {one.status for one in everything} == set(ExecutionStatus)
    assert everything[-4].attributes == {} != everything[0].attributes == {"env": "prod"}

    times = (0, began_ms + 65_000, began_ms + 10_000_000)
    combinations = itertools.product(
        ("", "w", "v", "unknown"), ("", *ExecutionStatus.__members__), times, times, (*ATTRIBUTES, {"env": "x"})
    )
    for workflow_id, status, since_ms, until_ms, attributes in combinations:
        expected = [
            one.execution_id
            for one in everything
            if workflow_id in ("", one.workflow_id)
            and status in ("", one.status.value)
            and since_ms <= one.created_ms
            and (not until_ms or one.created_ms < until_ms)
            and attributes.items() <= one.attributes.items()
        ]
        conditions: Any = {"since_ms": since_ms, "until_ms": until_ms, "attributes": attributes}
        found = await store.run(listing.list_executions, workflow_id, status, 1000, **conditions)
        assert [one.execution_id for one in found] == expected
        # The same list in pages.
        pages: list[str] = []
        while page := await store.run(
            listing.list_executions, workflow_id, status, 3, before=pages[-1] if pages else "", **conditions
        ):
            pages += [one.execution_id for one in page]
        assert pages == expected
        found = await store.run(listing.list_executions, workflow_id, status, 1000, key_prefix="k/", **conditions)
        keyed = {one.execution_id for one in everything if one.idempotency_key.startswith("k/")}
        assert [one.execution_id for one in found] == [one for one in expected if one in keyed]


@pytest.mark.both_stores
async def test_time_filter_finds_newest_after_clock_was_put_back(store: Store, clock: ManualClock) -> None:
    await start(store)
    clock.advance(3600)
    await start(store)
    clock.advance(-1800)
    newest = await start(store)
    found = await store.run(listing.list_executions, "", "", 10, since_ms=clock.now_ms())
    assert found[0].execution_id == newest


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ({"": "x"}, "an attribute's name is empty"),
        ({"a=b": "x"}, "'a=b' can't be the name of an attribute"),
        ({"a" * 65: "x"}, "use up to 64 characters"),
        ({"a": "x" * 201}, "the value of attribute 'a' has 201 characters; the limit is 200"),
        ({"a": "\n"}, "unprintable"),
        ({str(number): "x" for number in range(11)}, "there are 11 attributes; the limit is 10"),
    ],
)
async def test_wrong_attributes_are_refused(store: Store, attributes: dict[str, str], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        await start(store, attributes=attributes)
    assert await store.run(listing.list_executions, "", "", 10) == []


@pytest.mark.both_stores
async def test_key_keeps_the_attributes_of_its_first_start(store: Store) -> None:
    first = await start(store, key="k", attributes={"customer": "c-1", "empty": ""})
    assert await start(store, key="k", attributes={"customer": "c-2"}) == first
    execution = await store.run(reading.get_execution, first)
    assert execution.attributes == {"customer": "c-1", "empty": ""}
    await end(store, "w", "COMPLETED")
    (found,) = await store.run(listing.list_executions, "", "", 9, attributes={"empty": ""}, with_nodes=True)
    assert found.attributes == execution.attributes


# ---- Sessions --------------------------------------------------------------------------------------------------------


async def own(store: Store, workflow_id: str, key: str, output: object = None) -> str:
    text = "" if output is None else json.dumps(output)
    one = (workflow_id, workflow_id, "{}", key, "owner", 30_000, "", text)
    return (await store.run(tasks.start_owned, *one)).execution_id


async def grouped(store: Store, status: str = "") -> list[tuple[str, SessionSummary | None]]:
    found = await store.run(listing.list_executions, "", status, 100, group_sessions=True)
    return [(one.execution_id, one.session) for one in found]


@pytest.mark.both_stores
async def test_session_is_one_item(store: Store, clock: ManualClock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "_CANDIDATES", 3)
    summary = {"question": "Why?", "calls": 3, "tokens": 50}
    await own(store, "run", "s1/9", {"last": 1})
    for n in range(4):
        await own(store, "event", f"s1/agent/{n}", {"summary": {**summary, "tokens": n, "number": 4 - n}})
    plain = await start(store, "w", "s1/plain")
    latest = await own(store, "run", "s1/10")
    began_first = await own(store, "event", "s1/agent/8")
    await own(store, "event", "s1/agent/9", {"summary": {**summary, "calls": 2, "number": 5}})
    # In the same millisecond, the event `s1/agent/8` began before `s1/agent/9`, and is recorded after it.
    await own(store, "event", "s1/agent/8", {"summary": {**summary, "number": 6}})
    assert (await store.run(reading.get_execution, began_first)).status is ExecutionStatus.COMPLETED
    await own(store, "event", "s1/agent/10")  # begun, but without a result
    other = await own(store, "run", "s10/1", {"last": 0})
    odd = await own(store, "event", "no-session", {"summary": "odd"})
    expected = [
        (odd, None),
        (other, SessionSummary("s10", 0, False, "", 0, 0)),
        (latest, SessionSummary("s1", 6, True, "Why?", 3, 50)),
        (plain, None),
    ]
    assert await grouped(store) == expected
    assert await grouped(store, "RUNNING") == expected[2:]
    assert await grouped(store, "COMPLETED") == expected[:2]
    assert len(await store.run(listing.list_executions, "", "", 100)) == 12
    # The owner dies.
    clock.advance(60)
    await store.run(leases.sweep, 0)
    assert await grouped(store, "RUNNING") == [(latest, SessionSummary("s1", 6, False, "Why?", 3, 50)), (plain, None)]


@pytest.mark.both_stores
async def test_event_that_was_sent_to_a_session_hides_no_summary(store: Store, clock: ManualClock) -> None:
    run = await own(store, "run", "s/1")
    await own(store, "event", "s/agent/1", {"summary": {"question": "Why?", "calls": 1, "tokens": 5, "number": 1}})
    clock.advance(1)
    await own(store, "v", "s/payment/1", {"amount": 990})
    assert (await grouped(store))[-1] == (run, SessionSummary("s", 1, True, "Why?", 1, 5))


@pytest.mark.parametrize("odd", [None, "x", 5, {"question": 5}, {"calls": "many"}, [1]])
async def test_odd_summary_is_empty(store: Store, odd: object) -> None:
    run = await own(store, "run", "s/1")
    await own(store, "event", "s//1", {"summary": odd})
    assert await grouped(store) == [(run, SessionSummary("s", 1, True, "", 0, 0))]


@pytest.mark.both_stores
async def test_session_whose_newest_event_has_the_character_nul_is_listed(store: Store) -> None:
    summary = {"question": "Why\0?", "calls": 1, "tokens": 2, "number": 1}
    await own(store, "event", "s/agent/1", {"content": "a\0b", "summary": summary})
    await own(store, "run", "s/1", {"last": 1})
    ((_, session),) = await grouped(store)
    assert session is not None
    assert (session.calls, session.question.replace("\0", "\ufffd")) == (1, "Why\ufffd?")
