"""The clock of a server, beside the clock that it follows and the clock of its machine."""

from __future__ import annotations

import time

import pytest

from nexum_engine.clock import SystemClock
from nexum_engine.store import open_store

HOUR_MS = 3_600_000


@pytest.fixture
def wrong_clock(monkeypatch: pytest.MonkeyPatch) -> SystemClock:
    """Return the clock of a machine that is an hour ahead."""
    real = time.time_ns
    with monkeypatch.context() as patched:
        patched.setattr(time, "time_ns", lambda: real() + HOUR_MS * 1_000_000)
        return SystemClock()


async def test_server_of_a_machine_with_a_wrong_clock_has_the_databases_time(
    postgres_url: str, wrong_clock: SystemClock
) -> None:
    store = await open_store(postgres_url, wrong_clock)
    await store.close()
    assert abs(wrong_clock.now_ms() - time.time() * 1000) < HOUR_MS / 2  # PostgreSQL runs on this machine


def test_clock_that_is_ahead_of_another_one_runs_at_half_speed(
    wrong_clock: SystemClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed = time.monotonic_ns()
    monkeypatch.setattr(time, "monotonic_ns", lambda: passed)
    ahead_ms = wrong_clock.now_ms()
    wrong_clock.follow(ahead_ms - HOUR_MS, ahead_ms - HOUR_MS)
    assert wrong_clock.now_ms() == ahead_ms
    for hours, expected in ((1, 0.5), (1, 1), (1, 2)):  # after two hours, the other clock has caught up
        passed += hours * HOUR_MS * 1_000_000
        assert wrong_clock.now_ms() - ahead_ms == pytest.approx(expected * HOUR_MS, abs=1)
