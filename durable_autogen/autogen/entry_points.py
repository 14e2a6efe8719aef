"""AutoGen's methods that record: wrapped once for each class that defines them, while at least one session is open.

Nothing of a program's is searched or replaced: an object keeps its class, its attributes and its methods. Outside a
session, and inside a call that is being recorded, the wrapped methods pass everything through, so only the outermost
call is on record.
"""

from __future__ import annotations

import functools
import inspect
import logging
import threading
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from autogen_agentchat.agents import CodeExecutorAgent, UserProxyAgent
from autogen_agentchat.base import ChatAgent, Team, TerminationCondition
from autogen_agentchat.teams._group_chat._base_group_chat_manager import BaseGroupChatManager
from autogen_agentchat.teams._group_chat._chat_agent_container import ChatAgentContainer
from autogen_core import AgentRuntime, BaseAgent
from autogen_core.code_executor import CodeExecutor
from autogen_core.memory import ListMemory, Memory
from autogen_core.models import ChatCompletionClient
from autogen_core.tools import BaseTool, StaticWorkbench, Workbench
from pydantic import BaseModel

from durable_autogen.autogen import conditions
from durable_autogen.autogen.at_work import AtWork
from durable_autogen.autogen.calls import Calls, has_agent_as_tool, is_recorded_inside
from durable_autogen.autogen.work import Work, total
from durable_autogen.record.failures import ordinary
from durable_autogen.record.place import Place, at, current, recording_place, steps_at
from durable_autogen.record.session import Session

Original = Callable[..., Any]
"""A method as the class defines it, bound to its object."""

_works: weakref.WeakKeyDictionary[Session, Work] = weakref.WeakKeyDictionary()


def work_of(session: Session) -> Work:
    """Return AutoGen's state of an open session."""
    if session not in _works:
        _works[session] = Work(session.recorder)
    return _works[session]


def _calls(place: Place) -> Calls:
    return Calls(place, work_of(place.session))


# ---- Calls that are recorded -----------------------------------------------------------------------------------------


def _argument(args: Sequence[Any], kwargs: Mapping[str, Any], number: int, name: str) -> Any:
    """Return an argument however it was passed: the original gets its arguments exactly as the caller gave them."""
    return args[number] if number < len(args) else kwargs.get(name)


def _with_first(
    args: Sequence[Any], kwargs: Mapping[str, Any], name: str, value: Any
) -> tuple[Sequence[Any], Mapping[str, Any]]:
    return ((value, *args[1:]), kwargs) if args else (args, {**kwargs, name: value})


async def _create(self: Any, original: Original, *args: Any, **kwargs: Any) -> Any:
    place = recording_place()
    if place is None:
        return await original(*args, **kwargs)
    messages = _argument(args, kwargs, 0, "messages")

    async def ask(told: Any) -> Any:
        given, named = (args, kwargs) if told is messages else _with_first(args, kwargs, "messages", told)
        return await original(*given, **named)

    return await _calls(place).reply(self, ask, messages, kwargs)


async def _create_stream(self: Any, original: Original, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
    place = recording_place()
    messages = _argument(args, kwargs, 0, "messages")

    def ask(told: Any) -> AsyncIterator[Any]:
        given, named = (args, kwargs) if told is messages else _with_first(args, kwargs, "messages", told)
        stream: AsyncIterator[Any] = original(*given, **named)
        return stream

    async for piece in _closing(
        ask(messages) if place is None else _calls(place).streamed_reply(self, ask, messages, kwargs)
    ):
        yield piece


def _usage(self: Any, original: Original, *args: Any, **kwargs: Any) -> Any:
    place = current.get()
    if place is None or place.in_call or place.session.is_over:
        return original(*args, **kwargs)
    with at(replace(place, in_call=True)):
        usage = original(*args, **kwargs)
    # A program that decides by what it has used has to decide the same in a replay.
    return total(usage, work_of(place.session).replayed_usage_of(self))


async def _call_tool(self: Any, original: Original, *args: Any, **kwargs: Any) -> Any:
    place = recording_place()
    name, arguments, token, call_id = _tool_arguments(args, kwargs)
    if place is None:
        return await original(*args, **kwargs)
    calls = _calls(place)
    if has_agent_as_tool(self, name):
        calls.agent_as_tool(call_id, name)
        return await original(*args, **kwargs)
    return await calls.workbench_tool(self, lambda: original(*args, **kwargs), name, arguments or {}, token, call_id)


async def _call_tool_stream(self: Any, original: Original, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
    place = recording_place()
    name, arguments, token, call_id = _tool_arguments(args, kwargs)
    stream: AsyncIterator[Any]
    if place is None:
        stream = original(*args, **kwargs)
    elif has_agent_as_tool(self, name):
        _calls(place).agent_as_tool(call_id, name)
        stream = steps_at(replace(place, hands_on_late=place.is_beside_others), original(*args, **kwargs))
    else:
        stream = _calls(place).workbench_tool_stream(
            self, lambda: original(*args, **kwargs), name, arguments or {}, token, call_id
        )
    async for item in _closing(stream):
        yield item


def _tool_arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any, Any, Any]:
    names = ("name", "arguments", "cancellation_token", "call_id")
    name, arguments, token, call_id = (_argument(args, kwargs, number, one) for number, one in enumerate(names))
    return name, arguments, token, call_id


async def _list_tools(self: Any, original: Original, *args: Any, **kwargs: Any) -> Any:
    place = recording_place()
    # The tools of a StaticWorkbench are the program's own.
    if place is None or (isinstance(self, StaticWorkbench) and type(self).list_tools is StaticWorkbench.list_tools):
        return await original(*args, **kwargs)
    return await _calls(place).tool_list(self, lambda: original(*args, **kwargs))


async def _run_json(self: Any, original: Original, *args: Any, **kwargs: Any) -> Any:
    place = recording_place()
    if place is None and current.get() is not None:
        # Inside a recorded call, StaticWorkbench gives each tool a task: SystemExit in it would end the event loop.
        return await ordinary(original(*args, **kwargs), self.name)
    if place is None or is_recorded_inside(self):
        return await original(*args, **kwargs)
    arguments, token = _argument(args, kwargs, 0, "args"), _argument(args, kwargs, 1, "cancellation_token")
    call_id = _argument(args, kwargs, 2, "call_id")
    return await _calls(place).tool(self, lambda: original(*args, **kwargs), _dumped(arguments), token, call_id)


async def _run_json_stream(self: Any, original: Original, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
    place = recording_place()
    stream: AsyncIterator[Any]
    if place is None or is_recorded_inside(self):
        stream = original(*args, **kwargs)
    else:
        arguments, token = _argument(args, kwargs, 0, "args"), _argument(args, kwargs, 1, "cancellation_token")
        call_id = _argument(args, kwargs, 2, "call_id")
        stream = _calls(place).tool_stream(self, lambda: original(*args, **kwargs), _dumped(arguments), token, call_id)
    async for item in _closing(stream):
        yield item


async def _get_input(self: Any, original: Original, *args: Any, **kwargs: Any) -> Any:
    place = recording_place()
    if place is None:
        return await original(*args, **kwargs)
    prompt, token = _argument(args, kwargs, 0, "prompt"), _argument(args, kwargs, 1, "cancellation_token")
    return await _calls(place).input(lambda: original(*args, **kwargs), prompt, token)


async def _execute_code_blocks(self: Any, original: Original, *args: Any, **kwargs: Any) -> Any:
    place = recording_place()
    if place is None:
        return await original(*args, **kwargs)
    blocks, token = _argument(args, kwargs, 0, "code_blocks"), _argument(args, kwargs, 1, "cancellation_token")
    return await _calls(place).code(lambda: original(*args, **kwargs), blocks, token)


async def _query(self: Any, original: Original, *args: Any, **kwargs: Any) -> Any:
    place = recording_place()
    # What a ListMemory holds, the program itself has put into it.
    if place is None or type(self) is ListMemory:
        return await original(*args, **kwargs)
    query, token = _argument(args, kwargs, 0, "query"), _argument(args, kwargs, 1, "cancellation_token")
    return await _calls(place).memory(lambda: original(*args, **kwargs), query, token)


async def _look(self: Any, original: Original, *args: Any, **kwargs: Any) -> Any:
    place = recording_place()
    if place is None or type(self) in conditions.MESSAGES_ALONE or place.owner is self:
        return await original(*args, **kwargs)

    async def ask() -> Any:
        # A class that calls its base's method is one condition, and has one look.
        with at(replace(place, owner=self)):
            return await original(*args, **kwargs)

    return await conditions.look(self, place, work_of(place.session), ask)


async def _preparation(self: Any, original: Original, *args: Any, **kwargs: Any) -> Any:
    """Start or stop what runs tools or code: no effect of the program's, so it is neither recorded nor told."""
    place = current.get()
    if place is None:
        return await original(*args, **kwargs)
    with at(replace(place, in_call=True)):
        return await original(*args, **kwargs)


# ---- Who is at work --------------------------------------------------------------------------------------------------


def _at_work(self: Any, *, is_team: bool) -> AtWork | None:
    """The agent or team at work inside a session; None if its own method has called it, or outside a session."""
    place = recording_place()
    if place is None or place.owner is self:
        return None
    return AtWork(place, work_of(place.session), self, is_team=is_team)


async def _on_messages(self: Any, original: Original, *args: Any, **kwargs: Any) -> Any:
    working = _at_work(self, is_team=False)
    turn = original(*args, **kwargs)
    token = _argument(args, kwargs, 1, "cancellation_token")
    return await (turn if working is None else working.whole_turn(turn, token))


async def _on_messages_stream(self: Any, original: Original, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
    working = _at_work(self, is_team=False)
    stream = original(*args, **kwargs)
    token = _argument(args, kwargs, 1, "cancellation_token")
    async for item in _closing(stream if working is None else working.turn(stream, token)):
        yield item


async def _agent_run(self: Any, original: Original, *args: Any, **kwargs: Any) -> Any:
    working = _at_work(self, is_team=False)
    run = original(*args, **kwargs)
    return await (run if working is None else working.whole_run(run, kwargs.get("task")))


async def _agent_run_stream(self: Any, original: Original, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
    working = _at_work(self, is_team=False)
    stream = original(*args, **kwargs)
    async for item in _closing(stream if working is None else working.run(stream, kwargs.get("task"))):
        yield item


async def _team_run_stream(self: Any, original: Original, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
    working = _at_work(self, is_team=True)
    stream = original(*args, **kwargs)
    async for item in _closing(stream if working is None else working.team_run(stream, kwargs.get("task"))):
        yield item


async def _on_message(self: Any, original: Original, *args: Any, **kwargs: Any) -> Any:
    place = _place_of(_argument(args, kwargs, 0, "message"))
    if place is None or place.in_call or place.session.is_over:
        return await original(*args, **kwargs)
    if not isinstance(self, (ChatAgentContainer, BaseGroupChatManager)):
        # A core agent goes by its type. AgentChat's own work as their team, and its agents by their names.
        name = work_of(place.session).names.of(self, self.id.type)
        place = Place(place.session, agent=name, path=name, is_inside=True, owner=self)
    with at(place):
        return await original(*args, **kwargs)


_sent: dict[int, tuple[Any, Place]] = {}
"""Messages that were sent inside a session, with the place of their sender."""
MAX_SENT = 10_000  # messages; nothing tells when all subscribers have got one, so the oldest is dropped


def _place_of(message: Any) -> Place | None:
    """The place from which a message was sent: a runtime that was started before the session doesn't pass it on."""
    sent = _sent.get(id(message))
    return sent[1] if sent is not None and sent[0] is message else current.get()


async def _send(self: Any, original: Original, *args: Any, **kwargs: Any) -> Any:
    place = current.get()
    if place is not None and not place.session.is_over:
        message = _argument(args, kwargs, 0, "message")
        _sent[id(message)] = (message, place)
        while len(_sent) > MAX_SENT:
            _sent.pop(next(iter(_sent)))
    return await original(*args, **kwargs)


async def _closing(stream: AsyncIterator[Any]) -> AsyncGenerator[Any, None]:
    try:
        async for item in stream:
            yield item
    finally:
        close: Any = getattr(stream, "aclose", None)
        if close is not None:
            await close()


def _dumped(args: Any) -> Mapping[str, Any]:
    """The arguments of a tool, which `run_json` takes as a mapping and `run` as a model."""
    if isinstance(args, BaseModel):
        return args.model_dump(mode="json")
    return args if isinstance(args, Mapping) else {"arguments": str(args)}


# ---- Wrapping --------------------------------------------------------------------------------------------------------

Methods = Mapping[str, Callable[..., Any]]

ENTRY_POINTS: tuple[tuple[type, Methods], ...] = (
    (
        ChatCompletionClient,
        {"create": _create, "create_stream": _create_stream, "actual_usage": _usage, "total_usage": _usage},
    ),
    (
        Workbench,
        {
            "call_tool": _call_tool,
            "call_tool_stream": _call_tool_stream,
            "list_tools": _list_tools,
            **dict.fromkeys(("start", "stop", "reset"), _preparation),
        },
    ),
    (
        BaseTool,
        {
            "run_json": _run_json,
            "run": _run_json,
            "run_json_stream": _run_json_stream,
            "run_stream": _run_json_stream,
        },
    ),
    (UserProxyAgent, {"_get_input": _get_input}),
    (CodeExecutorAgent, {"execute_code_block": _execute_code_blocks}),
    (
        CodeExecutor,
        {
            "execute_code_blocks": _execute_code_blocks,
            **dict.fromkeys(("start", "stop", "restart"), _preparation),
        },
    ),
    (Memory, {"query": _query}),
    (TerminationCondition, {"__call__": _look}),
    (
        ChatAgent,
        {
            "on_messages": _on_messages,
            "on_messages_stream": _on_messages_stream,
            "run": _agent_run,
            "run_stream": _agent_run_stream,
        },
    ),
    (Team, {"run_stream": _team_run_stream}),
    (BaseAgent, {"on_message_impl": _on_message}),
    (AgentRuntime, {"send_message": _send, "publish_message": _send}),
)
"""For each base class, the methods that are wrapped wherever one of its subclasses defines them."""

_lock = threading.RLock()
_open_sessions = 0
_wrapped: dict[tuple[type, str], tuple[Any, Any]] = {}
"""The original and the wrapper of each method."""


@contextmanager
def entry_points(session: Session) -> Iterator[None]:
    """Let AutoGen's methods record for the length of a `with`; several may overlap."""
    global _open_sessions
    with _lock:
        _open_sessions += 1
        for base, methods in ENTRY_POINTS:
            if _open_sessions == 1:
                _watch_subclasses(base, methods)
            _wrap_all(base, methods)
    log = logging.getLogger("autogen_core")

    def is_news(_: logging.LogRecord) -> bool:
        # AutoGen logs a traceback for every agent that ends with the run; the run's own error says it all.
        place = current.get()
        return place is None or place.session is not session or not session.recorder.failed.done()

    log.addFilter(is_news)
    try:
        yield
    finally:
        log.removeFilter(is_news)
        with _lock:
            _open_sessions -= 1
            if _open_sessions == 0:
                _restore()
        for key in [key for key, (_, place) in list(_sent.items()) if place.session is session]:
            _sent.pop(key, None)


def _wrap_all(base: type, methods: Methods) -> None:
    for kind in reversed(_with_subclasses(base)):
        for name, wrapper in methods.items():
            _wrap(base, kind, name, wrapper)


def _with_subclasses(kind: type) -> list[type]:
    found: dict[type, None] = {}
    ahead = [kind]
    while ahead:
        one = ahead.pop()
        if one not in found:
            found[one] = None
            ahead += type.__subclasses__(one)
    return list(found)


def _wrap(base: type, kind: type, name: str, wrapper: Callable[..., Any]) -> None:
    original = kind.__dict__.get(name)
    is_inherited = False
    if original is None:
        # A parent that is no AutoGen class may bring the method.
        owner = next((one for one in kind.__mro__ if name in one.__dict__), None)
        is_inherited = owner is not None and not issubclass(owner, base) and owner not in base.__mro__
        original = owner.__dict__[name] if owner is not None and is_inherited else None
    if (
        original is None
        or getattr(original, "__isabstractmethod__", False)
        or isinstance(original, (staticmethod, classmethod, property))
        or not callable(original)
        or (kind, name) in _wrapped
        or kind is AgentRuntime
    ):
        return
    wrapped = _wrapper_of(original, wrapper)
    _wrapped[kind, name] = (None if is_inherited else original, wrapped)
    setattr(kind, name, wrapped)


def _wrapper_of(original: Any, wrapper: Callable[..., Any]) -> Any:
    """A method of the same kind, name and signature, which calls the wrapper with its object and the bound original."""

    def bound(self: Any) -> Original:
        get = getattr(original, "__get__", None)
        return original if get is None else get(self, type(self))  # type: ignore[no-any-return]

    if inspect.isasyncgenfunction(original):

        async def stream(self: Any, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
            async for item in _closing(wrapper(self, bound(self), *args, **kwargs)):
                yield item

        return functools.wraps(original)(stream)
    if inspect.iscoroutinefunction(original):

        async def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            return await wrapper(self, bound(self), *args, **kwargs)

        return functools.wraps(original)(call)

    # A plain function, which may return a coroutine or a stream.
    def plain(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper(self, bound(self), *args, **kwargs)

    return functools.wraps(original)(plain) if inspect.isfunction(original) else plain


def _watch_subclasses(base: type, methods: Methods) -> None:
    """Wrap the methods of classes that are defined from now on, as by an import inside the session."""
    own = base.__dict__.get("__init_subclass__")

    def init_subclass(cls: Any, /, **kwargs: Any) -> None:
        above: Any = super(base, cls)
        before: Any = own.__get__(None, cls) if own is not None else above.__init_subclass__
        before(**kwargs)
        with _lock:
            if _open_sessions:
                for name, wrapper in methods.items():
                    _wrap(base, cls, name, wrapper)

    _wrapped[base, "__init_subclass__"] = (own, None)
    hook: Any = classmethod(init_subclass)
    base.__init_subclass__ = hook  # type: ignore[method-assign]


def _restore() -> None:
    for (kind, name), (original, wrapped) in _wrapped.items():
        if wrapped is not None and kind.__dict__.get(name) is not wrapped:
            continue  # the program has put something else in its place
        if original is None:
            delattr(kind, name)
        else:
            setattr(kind, name, original)
    _wrapped.clear()
