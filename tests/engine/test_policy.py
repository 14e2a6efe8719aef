"""Policies of tools: their checks, their description as data, the digest of a call, and TOML files."""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from nexum_engine.errors import FinalError, InvalidRequest
from nexum_engine.policy import NOT_DONE, Policy, call_digest, read_policies
from nexum_engine.workflow import Rate, RetryPolicy

APPROVAL = "'always' or, in a program, a plain function (not async)"


def large(cents: int, **_: Any) -> bool:
    return cents > 10_000


async def asked(**_: Any) -> bool:
    return True


def find(arguments: Mapping[str, Any], key: str) -> Any:
    return NOT_DONE if key == "new" else f"{key} {arguments['cents']}"


async def find_slowly(arguments: Mapping[str, Any], key: str) -> Any:
    return find(arguments, key)


@pytest.mark.parametrize(
    ("policy", "arguments", "needs"),
    [
        (Policy(), {"cents": 20_000}, False),
        (Policy(approval="always"), {}, True),
        (Policy(approval=large), {"cents": 20_000, "customer": "c"}, True),
        (Policy(approval=large), {"cents": 10_000, "customer": "c"}, False),
    ],
)
def test_policy_says_which_calls_need_an_approval(policy: Policy, arguments: dict[str, Any], needs: bool) -> None:
    assert policy.needs_approval("pay", arguments) is needs


def test_failure_of_an_approval_function_names_the_tool() -> None:
    policy = Policy(approval=lambda cents: cents > 0)
    with pytest.raises(FinalError, match=r"the approval function of pay failed, so the call was not made: TypeError: "):
        policy.needs_approval("pay", {"dollars": 1})


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"reconcile": find}, 'reconcile needs effect="once": an idempotent tool just runs again'),
        ({"approval_timeout": 5}, "approval_timeout needs approval"),
        ({"approval": asked}, f"approval: Input should be {APPROVAL} (given: {reprlib.repr(asked)})"),
        ({"approval": True}, f"approval: Input should be {APPROVAL} (given: True)"),
        ({"effect": "twice"}, "effect: Input should be 'idempotent' or 'once' (given: 'twice')"),
        ({"timeout": 0}, "timeout: Input should be greater than 0 (given: 0)"),
        ({"final": PermissionError}, "final: Input should be a valid tuple (given: <class 'PermissionError'>)"),
        ({"aproval": "always"}, "aproval: there is no such field"),
        (
            {"retry": {"max_attempts": 0}},
            "retry.max_attempts: Input should be greater than or equal to 1 (given: 0)",
        ),
        ({"rate": "10 per s"}, "rate: '10 per s' is not a rate: use, for instance, 10/s, 10/min, 500/h or 3/10s"),
        ({"rate": 3}, "rate: 3 is not a rate: use, for instance, 10/s, 10/min, 500/h or 3/10s"),
    ],
    # The names of the fields: the text about a function has its address, which differs between the processes of xdist.
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_policy_is_refused_with_one_line(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Policy(**fields)
    assert str(caught.value) == f"Policy: {problem}"


def test_wrong_retry_policy_or_rate_is_refused_with_one_line() -> None:
    with pytest.raises(InvalidRequest) as caught:
        RetryPolicy(max_attempts=0)
    assert str(caught.value) == "RetryPolicy: max_attempts: Input should be greater than or equal to 1 (given: 0)"
    with pytest.raises(InvalidRequest) as caught:
        Rate(calls=1, seconds=0)
    assert str(caught.value) == "Rate: seconds: Input should be greater than 0 (given: 0)"


def test_policy_is_described_as_data() -> None:
    policy = Policy(approval=large, effect="once", reconcile=find, final=(ValueError,), retry=RetryPolicy(), timeout=9)
    assert policy.described() == {
        "approval": "large",
        "effect": "once",
        "reconcile": "find",
        "retry": RetryPolicy().model_dump(),
        "final": ["ValueError"],
        "timeout": 9,
    }
    assert Policy().described() == {}


@pytest.mark.parametrize("reconcile", [find, find_slowly])
async def test_reconcile_may_be_plain_or_async(reconcile: Any) -> None:
    policy = Policy(effect="once", reconcile=reconcile)
    assert await policy.reconciled({"cents": 5}, "k") == "k 5"
    assert await policy.reconciled({"cents": 5}, "new") is NOT_DONE


def test_digest_depends_on_tool_and_arguments_only() -> None:
    digest = call_digest("charge", {"cents": 5, "to": {"name": "ann", "city": "ulm"}})
    assert digest == call_digest("charge", {"to": {"city": "ulm", "name": "ann"}, "cents": 5})
    others: list[tuple[str, dict[str, Any]]] = [
        ("charge", {"cents": 5}),
        ("charg", {"cents": 5}),
        ("charge", {"cents": "5"}),
        ("charge", {"cents": 5.5}),
    ]
    assert len({digest, *(call_digest(tool, arguments) for tool, arguments in others)}) == 5


TOML = """
[charge]
approval = "always"
effect = "once"
timeout = 30
retry = { max_attempts = 3, first_delay_seconds = 1 }

[model]
timeout = 9.5
"""


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib is new in Python 3.11")
def test_policies_are_read_from_toml(tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text(TOML)
    assert read_policies(tmp_path / "p.toml") == {
        "charge": Policy(approval="always", effect="once", timeout=30, retry=RetryPolicy(max_attempts=3)),
        "model": Policy(timeout=9.5),
    }


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib is new in Python 3.11")
@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('[charge]\napproval = "sometimes"', "charge.approval: Input should be 'always'"),
        ('[charge]\nreconcile = "find"', "charge.reconcile: Input should be callable"),
        ("[charge]\naproval = 1", "charge.aproval: there is no such field"),
        ("[charge]\napproval_timeout = 3", "charge: approval_timeout needs approval"),
        ('[charge.retry]\nmax_attempts = "3"', "charge.retry.max_attempts: Input should be a valid integer"),
        ("charge = 1", "charge must be a table: [charge]"),
        ("[charge", "is not TOML"),
        (None, "can't be read: No such file or directory"),
    ],
)
def test_wrong_file_is_explained_in_one_line(tmp_path: Path, text: str | None, problem: str) -> None:
    file = tmp_path / "p.toml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(InvalidRequest) as refused:
        read_policies(file)
    message = str(refused.value)
    assert (str(file) in message, problem in message, "\n" in message) == (True, True, False), message
