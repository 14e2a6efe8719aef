"""Wrapping of methods, in each class that defines them: so no object of the program has to be found or replaced."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from autogen_core import AgentRuntime

from durable_autogen.record.failures import with_subclasses
from durable_autogen.record.tasks import closing


class Original:
    """The original of a wrapped method, bound to its object and to the arguments of one call."""

    def __init__(self, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.method, self.args, self.kwargs = method, args, kwargs

    def __call__(self) -> Any:
        return self.method(*self.args, **self.kwargs)

    def given(self, number: int, name: str) -> Any:
        """Return the argument at position `number` or with the name `name`, however the caller passed it."""
        return self.args[number] if number < len(self.args) else self.kwargs.get(name)

    def with_argument(self, number: int, name: str, value: Any) -> Original:
        """Return a copy in which `value` is the argument at position `number` or with the name `name`."""
        if number < len(self.args):
            return Original(self.method, (*self.args[:number], value, *self.args[number + 1 :]), self.kwargs)
        return Original(self.method, self.args, {**self.kwargs, name: value})


Wrapper = Callable[[Any, Original], Any]
"""A function that replaces a method. Its parameters are the object whose method is called, and the `Original`.

It returns what the method returns: an awaitable, a stream or a value."""

Methods = Mapping[str, Wrapper]
"""The wrappers of a class's methods, by the methods' names."""

_lock = threading.RLock()
_wrapped: dict[tuple[type, str], tuple[Any, Any]] = {}
"""The original and the replacement of each wrapped method, by class and method name."""


@contextmanager
def wrapped(classes: Sequence[tuple[type, Methods]]) -> Iterator[None]:
    """For the length of a `with`, wrap methods of these classes, in each subclass that defines them.

    Don't enter it a second time meanwhile (see `while_open`).
    """
    with _lock:
        for base, methods in classes:
            _watch_subclasses(base, methods)
            for kind in reversed(with_subclasses(base)):
                for name, wrapper in methods.items():
                    _wrap(base, kind, name, wrapper)
    try:
        yield
    finally:
        _restore()


def _wrap(base: type, kind: type, name: str, wrapper: Wrapper) -> None:
    original = kind.__dict__.get(name)
    is_inherited = False
    if original is None:
        # If the class inherits the method from a mixin, wrap the method in this class: the mixin itself isn't wrapped.
        owner = next((one for one in kind.__mro__ if name in one.__dict__), None)
        is_inherited = owner is not None and not issubclass(owner, base) and owner not in base.__mro__
        original = owner.__dict__[name] if owner is not None and is_inherited else None
    if (
        original is None
        or getattr(original, "__isabstractmethod__", False)
        or isinstance(original, (staticmethod, classmethod))
        or isinstance(original, property) != isinstance(getattr(base, name, None), property)
        or not (callable(original) or isinstance(original, (property, functools.partialmethod)))
        or (kind, name) in _wrapped
        or kind is AgentRuntime
    ):
        return
    replacement = _wrapper_of(original, wrapper)
    _wrapped[kind, name] = (None if is_inherited else original, replacement)
    setattr(kind, name, replacement)


def _wrapper_of(original: Any, wrapper: Wrapper) -> Any:
    """Return a method that calls `wrapper`. The method has the kind, name and signature of `original`.

    The wrapper of a property is a property.
    """
    if isinstance(original, property):

        def get(self: Any) -> Any:
            return wrapper(self, Original(original.__get__, (self, type(self)), {}))

        return property(get, original.fset, original.fdel, original.__doc__)

    def bound(self: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Original:
        get = getattr(original, "__get__", None)
        return Original(original if get is None else get(self, type(self)), args, kwargs)

    if inspect.isasyncgenfunction(original):

        async def stream(self: Any, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
            async with closing(wrapper(self, bound(self, args, kwargs))) as items:
                async for item in items:
                    yield item

        return functools.wraps(original)(stream)
    if inspect.iscoroutinefunction(original):

        async def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            return await wrapper(self, bound(self, args, kwargs))

        return functools.wraps(original)(call)

    # `original` is a plain function. It may return a coroutine or a stream.
    def function(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper(self, bound(self, args, kwargs))

    return functools.wraps(original)(function) if inspect.isfunction(original) else function


def _watch_subclasses(base: type, methods: Methods) -> None:
    """Wrap `methods` in each subclass of `base` that is defined later, for example by an import inside the session."""
    own = base.__dict__.get("__init_subclass__")

    def init_subclass(cls: Any, /, **kwargs: Any) -> None:
        above: Any = super(base, cls)
        before: Any = own.__get__(None, cls) if own is not None else above.__init_subclass__
        before(**kwargs)
        with _lock:
            if _wrapped:  # else the last session has just ended
                for name, wrapper in methods.items():
                    _wrap(base, cls, name, wrapper)

    hook: Any = classmethod(init_subclass)
    _wrapped[base, "__init_subclass__"] = (own, hook)
    base.__init_subclass__ = hook  # type: ignore[method-assign]


def _restore() -> None:
    with _lock:
        for (kind, name), (original, replacement) in _wrapped.items():
            if kind.__dict__.get(name) is not replacement:
                continue  # the program has replaced the method, too: leave its own function
            if original is None:
                delattr(kind, name)
            else:
                setattr(kind, name, original)
        _wrapped.clear()
