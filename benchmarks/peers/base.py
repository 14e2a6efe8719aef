"""The unit of work of benchmarks/compare.py, and the interface of each peer.

The unit of work is one tool call: about 300 bytes of arguments, a tool that does nothing, 1 KB of result. Calls are
made in runs: a run has a name, and makes its calls one after the other. If the caller's process executes the calls, a
run is one session, workflow or thread of the peer. Otherwise, it is a loop of independent calls.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from enum import Enum
from functools import cache
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Protocol, TypeVar

IN_FLIGHT = 32
RECORDED = 20  # the number of calls that are recorded before the caller is killed
RESULT_BYTES = 1024
ARGUMENT_BYTES = 280  # the JSON has 300 bytes: it adds the argument's name and the quotes
STOPPED = "stopped-"  # if a run's name begins with this, the run's last call hangs when it is first executed
FOLDER = "COMPARE_FOLDER"  # the environment variable that names the peer's folder

T = TypeVar("T")

Settings = dict[str, str]
"""The addresses and paths that a peer's processes need."""


class Group(str, Enum):
    """Where a call is executed. Rows of different groups never share a table."""

    CALLER = "executed in the caller's process"
    WORKER = "executed by another process"


@dataclass(frozen=True)
class Call:
    """The moments of one call of a run, as time.time() gives them."""

    began: float
    executed: float
    """When the tool ran. For a replayed call, that was in an earlier process."""
    ended: float
    """When the caller got the result. For LangGraph, when the next call began."""


class Caller(Protocol):
    """The caller's side of a peer, connected and ready."""

    async def run(self, name: str, calls: int) -> list[Call]:
        """Make the calls of a run one after the other. Continue the run if its process was killed."""


class Host(Protocol):
    """Starts the other programs that a peer needs: its servers."""

    folder: Path
    """The peer's own folder, on a disk. It lasts for all rounds."""

    async def program(self, command: list[str], *, env: dict[str, str] | None = None) -> None:
        """Start a program that ends with the benchmark."""

    async def postgres(self) -> str:
        """Start a PostgreSQL server with its default settings; return its URL."""

    def port(self, name: str) -> int:
        """Return a free port of 127.0.0.1. It is the same in every round."""


class Peer(ABC):
    """One row of the comparison."""

    name: str
    """The peer's name for the option --only."""
    title: str
    group: Group
    pages: tuple[str, ...]
    """The pages of the peer's documentation that its configuration follows."""
    setup: str
    """The configuration, in one or two sentences."""
    imports: tuple[str, ...] = ()
    """The modules that the caller imports before it connects."""
    needs: tuple[str, ...] = ()
    """The other modules that must be importable."""
    install: str = ""
    """The command that installs the peer."""
    is_whole = True
    """Whether the benchmark starts all processes of the peer. If not, fsyncs and memory are not measured."""
    replays = True
    """Whether a new process can get the results that an earlier process recorded."""
    restarts_worker = False
    """Whether the benchmark restarts a killed worker. If not, a second worker runs already."""

    def missing(self) -> str | None:
        """Return how to install the missing modules, or None if none is missing."""
        lacks = [module for module in self.imports + self.needs if not _is_importable(module)]
        return f"{self.install} (not importable: {', '.join(lacks)})" if lacks else None

    def versions(self) -> dict[str, str]:
        """Return the versions of the installed packages that the peer uses."""
        names = {module.partition(".")[0] for module in self.imports + self.needs}
        packages = {package for name in names for package in _packages().get(name, ())}
        return {package: version(package) for package in sorted(packages)}

    async def serve(self, host: Host) -> Settings:
        """Start the peer's servers; return the settings for its other processes."""
        return {}

    @abstractmethod
    def caller(self, settings: Settings) -> AbstractAsyncContextManager[Caller]:
        """Connect the caller. This runs in the caller's process."""

    def load(self) -> None:
        """Import the modules that the caller needs. This runs in the caller's process, before `caller`."""
        for module in self.imports:
            importlib.import_module(module)

    async def work(self, settings: Settings, ready: Callable[[], None]) -> None:
        """Run a worker until its process is ended; call `ready` when it can take calls."""
        raise NotImplementedError


@cache
def _packages() -> Mapping[str, Sequence[str]]:
    return packages_distributions()  # slow: it reads the lists of files of all packages


def _is_importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package of a submodule is missing
        return False


async def retried(connect: Callable[[], Awaitable[T]], patience: float = 60.0) -> T:
    """Call `connect` until it raises no error; return its result. The server or worker may still be starting."""
    deadline = time.monotonic() + patience
    while True:
        try:
            return await connect()
        except Exception:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.02)


def argument(run: str, number: int, calls: int) -> str:
    """Return the argument of a call of a run."""
    stops = run.startswith(STOPPED) and number == calls - 1
    return f"{run}/{number}/{'stop' if stops else ''}/".ljust(ARGUMENT_BYTES, "x")


def tool(argument: str) -> str:
    """Return a text of one kilobyte that begins with the time.

    If the run's name begins with STOPPED, the run's last call writes the id of its process into a file, and hangs for
    ever. When that call is executed again, it writes another file, and returns.
    """
    executed = time.time()
    run, _, stop, _ = argument.split("/", 3)
    if stop:
        first = stop_file(run)
        if not first.exists():
            _write(first, str(os.getpid()))
            threading.Event().wait()
        _write(again_file(run), repr(executed))
    return f"{executed!r} ".ljust(RESULT_BYTES, "y")


def executed_at(result: str) -> float:
    """Return the time at which the tool ran. Its result begins with this time."""
    if len(result) != RESULT_BYTES:
        raise ValueError(f"the result has {len(result)} characters instead of {RESULT_BYTES}")
    return float(result.split(" ", 1)[0])


def stop_file(run: str) -> Path:
    """Return the path of the file that the last call of a STOPPED run writes before it hangs."""
    return Path(os.environ[FOLDER]) / f"{run}.first"


def again_file(run: str) -> Path:
    """Return the path of the file that the last call of a STOPPED run writes when it is executed again."""
    return Path(os.environ[FOLDER]) / f"{run}.again"


def _write(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
