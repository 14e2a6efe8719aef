"""How failures are recorded, and which of them a later run keeps."""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import json
import sys
from typing import Any

import pytest
from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.teams import RoundRobinGroupChat
from durable_agents import (
    Failing,
    Offline,
    Scripted,
    all_of,
    answer,
    ask,
    asked,
    client,
    named,
    whole,
)
from openai_server import OpenAIServer
from server_thread import ServerThread

from durable_autogen import DurableSession
from durable_autogen.record.failures import MAX_GROUP, MAX_TEXT, Failure, RecordedFailure


async def test_call_of_outer_agent_shows_that_failure_was_survived(server: ServerThread) -> None:

    async def program() -> str:
        async with DurableSession("s", nexum=server.address):
            helper = named(Failing(model, "m", lambda: Offline("no")), "boss/helper")
            with pytest.raises(Offline):
                await ask(helper)
            first = await ask(named(client(model), "boss"))
            raise LookupError(first)  # so that the session isn't finished

    with OpenAIServer(lambda _: answer("yes")) as model:
        with pytest.raises(LookupError) as live:
            await whole(program)
        with pytest.raises(LookupError) as again:
            await whole(program)
        assert str(again.value) == str(live.value)
        assert len(model.requests) == 1


async def test_call_of_agent_with_similar_name_does_not_show_survival(server: ServerThread) -> None:
    broken = True

    async def program() -> list[Any]:
        async with DurableSession("s", nexum=server.address):
            fails = Failing(model, "worker", lambda: Offline("no") if broken and worked else None)
            worker, work = (
                named(fails, "worker"),
                named(client(model), "work"),
            )
            worked: list[str] = []
            worked.append(await ask(worker))

            async def works() -> str:
                first = await ask(work)
                await asyncio.sleep(0.05)  # the agent's own work
                return first + await ask(work)

            return await all_of(ask(worker), works())

    with OpenAIServer(lambda _: answer("yes")) as model:
        with pytest.raises(Offline):
            await whole(program)
        broken = False
        first = await whole(program)
        assert await whole(program) == first
        assert len(model.requests) == 4


async def test_survived_failure_is_kept_and_ending_failure_is_retried(server: ServerThread) -> None:
    broken = True

    async def program() -> list[Any]:
        async with DurableSession("s", nexum=server.address):
            cache = named(Failing(model, "x", lambda: Offline("survived")), "cache")
            other = named(client(model), "other")
            ends = Failing(model, "z", lambda: Offline("ends the run") if broken else None)

            async def falls_back() -> str:
                with pytest.raises(Offline):
                    await ask(cache)
                await asyncio.sleep(0.05)  # the agent's own work
                return await ask(other)

            return await all_of(falls_back(), ask(named(ends, "ends")))

    with OpenAIServer(lambda _: answer("yes")) as model:
        with pytest.raises(Offline, match="ends the run"):
            await whole(program)
        broken = False
        first = await whole(program)
        assert await whole(program) == first
        assert len(model.requests) == 2


async def test_failure_with_long_text_does_not_end_run(server: ServerThread) -> None:
    async def program() -> list[str]:
        async with DurableSession("s", nexum=server.address):
            failing = Failing(model, "m", lambda: LookupError("x" * 20_000_000))
            with pytest.raises(LookupError) as raised:
                await ask(named(failing, "a"))
            found = await ask(named(client(model), "b"))
            return [found, str(raised.value)[:MAX_TEXT], str(raised.value)[MAX_TEXT:][:10]]

    with OpenAIServer(lambda _: answer("yes")) as model:
        live = await whole(program)
        assert await whole(program) == [*live[:2], " [cut]"]
        assert len(model.requests) == 1


class Plain(Exception):
    """An error whose `args` are its constructor's arguments."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text, status)
        self.status = status


class Stated(Exception):
    """An error that takes only a keyword argument and makes its text from it."""

    def __init__(self, *, status: int) -> None:
        self.status = status

    def __str__(self) -> str:
        return f"status {self.status}"


class Kept(Exception):
    """An error with a constructor argument that `args` lacks."""

    def __init__(self, text: str, *, status: object) -> None:
        super().__init__(text)
        self.status = status


class Caused(Exception):
    """An error whose text contains its cause's text."""

    def __str__(self) -> str:
        return f"{self.args[0]}: {self.__cause__}"


class Listed(Exception):
    """An error whose text depends on an attribute. JSON can't hold the attribute, so it isn't recorded."""

    status = 0

    def __init__(self, *whys: object) -> None:
        super().__init__(*whys)
        self.whys: list[object] = []

    def __str__(self) -> str:
        return f"for {len(getattr(self, 'whys', ()))} reasons"


class Final(Listed, LookupError):
    """An error like `Listed` that refuses subclasses."""

    def __init_subclass__(cls) -> None:
        raise TypeError("nothing may be derived from it")


def caused() -> Caused:
    error = Caused("no")
    error.__cause__ = ValueError("why")
    return error


def with_whys(error: Listed) -> Listed:
    error.whys += [object(), object()]
    error.status = 503
    return error


def changed(error: Plain) -> Plain:
    error.status = 504
    return error


def again(error: Exception) -> Exception:
    """Return the error as a replay raises it."""
    return Failure.model_validate_json(Failure.of(error).model_dump_json()).again()


@pytest.mark.parametrize(
    "error",
    [
        Plain("no", 503),
        changed(Plain("no", 503)),
        Stated(status=503),
        Kept("no", status=503),
        KeyError("x"),
        FileNotFoundError(2, "no such thing", "file"),
        json.JSONDecodeError("no", "text", 3),
        ValueError({"code": 3, "reasons": ["a", None]}),
        Kept("no", status={"error": {"type": "quota"}}),
    ],
    ids=lambda error: type(error).__name__,
)
def test_recorded_failure_is_built_with_its_class(error: Exception) -> None:
    found = again(error)
    assert type(found) is type(error)
    assert (str(found), found.args, vars(found)) == (str(error), error.args, vars(error))
    names = ("errno", "filename")
    assert [getattr(found, name, None) for name in names] == [getattr(error, name, None) for name in names]


@pytest.mark.parametrize(
    ("error", "base", "args"),
    [
        (with_whys(Listed("a")), Listed, ("a",)),
        (with_whys(Listed(object())), Listed, ("for 2 reasons",)),
        (with_whys(Final("a")), Listed, ("a",)),
        (caused(), Caused, ("no",)),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), UnicodeDecodeError, None),
    ],
    ids=["plain arguments", "other arguments", "final", "caused", "bytes"],
)
def test_failure_that_cannot_be_built_has_derived_class(
    error: Exception, base: type[Exception], args: tuple[object, ...] | None
) -> None:
    found = again(error)
    assert isinstance(found, base)
    assert (type(found).__name__, type(found).__module__) == (type(error).__name__, type(error).__module__)
    assert (str(found), found.args) == (str(error), args or (str(error),))
    assert getattr(found, "status", None) == getattr(error, "status", None)


def test_failure_of_unloaded_class_has_its_name_and_text() -> None:
    class Hidden(Exception):
        pass

    found = again(Hidden("no"))
    # The class was found, although a function defines it.
    assert (type(found), str(found), found.args) == (Hidden, "no", ("no",))
    for module, name in (("builtins", "print"), ("builtins", "int"), ("builtins", "SystemExit"), ("not.there", "Gone")):
        found = Failure(module=module, name=name, text="no", attributes={"status": 1}).again()
        assert isinstance(found, RecordedFailure)
        assert (type(found).__name__, str(found), vars(found)) == (name, "no", {"status": 1})


def test_failure_with_lone_surrogates_is_recorded() -> None:
    missing = again(FileNotFoundError(2, "no such file", "caf\udce9"))
    assert isinstance(missing, FileNotFoundError)
    assert str(missing) == "[Errno 2] no such file: 'caf\\udce9'"
    odd = again(ValueError("caf\udce9"))
    assert (isinstance(odd, ValueError), str(odd)) == (True, "caf\ufffd")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="ExceptionGroup is new in Python 3.11")
def test_exception_group_is_built_with_its_members() -> None:
    group: Any = getattr(builtins, "ExceptionGroup")  # noqa: B009 - Python 3.10 has no such name
    inner = group("two", [Plain("no", 503), KeyError("x")])
    found: Any = again(group("one", [ValueError("a"), inner]))
    assert (type(found), str(found)) == (group, "one (2 sub-exceptions)")
    assert [repr(one) for one in found.exceptions[1].exceptions] == [repr(one) for one in inner.exceptions]
    assert found.split(KeyError)[0].exceptions[0].exceptions[0].args == ("x",)

    large: Any = again(group("many", [ValueError(number) for number in range(MAX_GROUP + 1)]))
    assert (isinstance(large, group), str(large)) == (True, f"many ({MAX_GROUP + 1} sub-exceptions)")
    assert [one.args for one in large.exceptions] == [(number,) for number in range(MAX_GROUP)]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="ExceptionGroup is new in Python 3.11")
def test_long_text_of_an_error_is_whole_and_the_members_of_a_group_share_the_limit() -> None:
    text = "x" * 100_000
    assert str(again(LookupError(text))) == text
    group: Any = getattr(builtins, "ExceptionGroup")  # noqa: B009 - Python 3.10 has no such name
    found: Any = again(group("many", [LookupError("x" * MAX_TEXT) for _ in range(10)]))
    assert {str(one) for one in found.exceptions} == {"x" * (MAX_TEXT // 10) + " [cut]"}


def test_record_of_an_error_is_limited_as_a_whole() -> None:
    error = LookupError(*["x" * (MAX_TEXT // 20)] * 20)
    for number in range(50):
        setattr(error, f"attribute{number}", "x" * MAX_TEXT)
    failure = Failure.of(error)
    assert (failure.args, failure.attributes) == (list(error.args), {})
    assert len(failure.model_dump_json()) < 3 * MAX_TEXT


async def test_only_newest_handled_failures_are_remembered(
    server: ServerThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("durable_autogen.record.setbacks.MAX_CONTINUED", 5)
    calls = 0

    def fails() -> Exception:
        nonlocal calls
        calls += 1
        return Offline(f"failure {calls}")

    async def program() -> None:
        async with DurableSession("s", nexum=server.address) as session:
            llm, errors = Failing(model, "m", fails), []
            for _ in range(20):
                with pytest.raises(Offline) as failed:
                    await ask(llm)
                errors.append(failed.value)
            assert len(session.recorder.setbacks._setbacks) == 6  # one of them is the last call
            raise errors[-3]

    with OpenAIServer(lambda _: answer("yes")) as model:
        for made in (20, 23):  # the run ended with the error of call 18, so that the next run makes this call again
            with pytest.raises(Offline):
                await whole(program)
            assert calls == made


async def test_failure_that_is_raised_again_after_other_calls_is_retried(server: ServerThread) -> None:
    happened: list[str] = []

    async def program() -> str:
        async with DurableSession("s", nexum=server.address):
            await asked(Scripted(happened, name="first"))
            try:
                return await asked(Scripted(happened, *([Offline("down")] if is_down else []), name="fails"))
            except Offline:
                await asked(Scripted(happened, name="clean up"))
                raise

    is_down = True
    for _ in range(2):
        with pytest.raises(Offline):
            await whole(program)
    is_down = False
    await whole(program)
    assert happened == ["first", *["fails", "clean up"] * 2, "fails"]
    await whole(program)
    assert len(happened) == 6


async def test_failure_whose_handler_fails_is_kept(server: ServerThread) -> None:
    happened: list[str] = []

    async def program() -> str:
        async with DurableSession("s", nexum=server.address):
            try:
                return await asked(Scripted(happened, Offline("down"), name="fails"))
            except Offline:
                await asked(Scripted(happened, name="fall back"))
                return await asked(Scripted(happened, *([Offline("also down")] if is_down else []), name="also"))

    is_down = True
    for _ in range(2):
        with pytest.raises(Offline, match="also down"):
            await whole(program)
    is_down = False
    await whole(program)
    assert happened == ["fails", "fall back", "also", "also", "also"]


async def test_failure_that_another_task_handles_is_kept(server: ServerThread) -> None:
    happened: list[str] = []

    async def program() -> str:
        async with DurableSession("s", nexum=server.address):
            try:
                await all_of(asked(Scripted(happened, Offline("down"), name="fails")), asked(Scripted(happened)))
            except Offline:
                await asked(Scripted(happened, name="fall back"))
                return await asked(Scripted(happened, *([Offline("also down")] if is_down else []), name="also"))
            return "never"

    is_down = True
    for _ in range(2):
        with pytest.raises(Offline, match="also down"):
            await whole(program)
    is_down = False
    await whole(program)
    assert sorted(happened) == ["also", "also", "also", "fails", "fall back", "model"]


@pytest.mark.parametrize("error", [asyncio.CancelledError, KeyboardInterrupt])
async def test_cancellation_keeps_a_handled_failure_and_what_came_after_it(
    server: ServerThread, error: type[BaseException]
) -> None:
    """The branches have names of their own. So the later calls don't show that the first branch handled its failure."""
    happened: list[str] = []

    async def program() -> str:
        async with DurableSession("s", nexum=server.address) as session:

            async def branch(name: str, *script: Any) -> str:
                with session.agent(name):
                    try:
                        return await asked(Scripted(happened, *script, name=name))
                    except Offline:
                        return "handled"

            await asyncio.gather(branch("first", Offline("down")))
            await asyncio.gather(branch("second"))
            if is_interrupted:
                raise error
            return (await asyncio.gather(branch("third")))[0]

    is_interrupted = True
    with pytest.raises(error):
        await program()
    is_interrupted = False
    await whole(program)
    assert happened == ["first", "second", "third"]


@pytest.mark.parametrize("branch", ["", "branch"])
@pytest.mark.parametrize("who", ["the program", "an agent"])
async def test_failure_that_is_raised_again_after_a_team_has_run_is_retried(
    server: ServerThread, who: str, branch: str
) -> None:
    happened: list[str] = []

    async def program() -> None:
        async with DurableSession("s", nexum=server.address) as session:
            with session.agent(branch) if branch else contextlib.nullcontext():
                await work()

    async def work() -> None:
        model = Scripted(happened, *([Offline("down")] if is_down else []), name="fails")
        try:
            if who == "the program":
                await asked(model)
            else:
                await AssistantAgent("first", model).run(task="Q")
        except Offline:
            member = AssistantAgent("one", Scripted(happened, name="clean up"))
            await RoundRobinGroupChat([member], max_turns=1).run(task="Q")
            raise

    is_down = True
    for _ in range(2):
        with pytest.raises(Offline):
            await whole(program)
    is_down = False
    await whole(program)
    assert happened == [*["fails", "clean up"] * 2, "fails"]
