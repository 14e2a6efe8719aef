"""LangGraph: nodes of a graph with a checkpointer on SQLite, in the caller's process.

- https://docs.langchain.com/oss/python/langgraph/durable-execution: `durability="sync"` persists each step before the
  next step starts; "async" persists it while the next step runs, and may lose it in a crash.
- https://reference.langchain.com/python/langgraph.checkpoint.sqlite: SqliteSaver for synchronous code (AsyncSqliteSaver
  for asynchronous code runs the same statements in a thread). The page says: "For local development, testing,
  or lightweight deployments".

A run is a thread, and a call is a step of a graph with one node. A call lasts from the start of its step to the start
of the next step. The last call of a run ends when all checkpoints of the run are written.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypedDict

from peers.base import Call, Group, Host, Peer, Settings, argument, executed_at, tool


class State(TypedDict):
    """The state of a thread: how many calls were made, and the last result."""

    run: str
    calls: int
    made: int
    result: str


class GraphCaller:
    """Runs threads of a graph."""

    def __init__(self, saver: Any, durability: str) -> None:
        from langgraph.graph import END, START, StateGraph

        self._durability = durability
        self._begun: dict[str, list[float]] = {}
        builder: Any = StateGraph(State)
        builder.add_node("call", self._call)
        builder.add_edge(START, "call")
        builder.add_conditional_edges("call", lambda state: "call" if state["made"] < state["calls"] else END)
        self._graph: Any = builder.compile(checkpointer=saver)

    def _call(self, state: State) -> dict[str, Any]:
        began = time.time()
        result = tool(argument(state["run"], state["made"], state["calls"]))
        self._begun[state["run"]] += [began, executed_at(result)]
        return {"made": state["made"] + 1, "result": result}

    async def run(self, name: str, calls: int) -> list[Call]:
        """Run a thread, or continue it from its last checkpoint."""
        return await asyncio.to_thread(self._run, name, calls)

    def _run(self, name: str, calls: int) -> list[Call]:
        config = {"configurable": {"thread_id": name}, "recursion_limit": calls + 5}
        recorded = self._graph.get_state(config).values
        made = recorded.get("made", 0)
        begun = self._begun[name] = []
        state = None if recorded else State(run=name, calls=calls, made=0, result="")
        self._graph.invoke(state, config, durability=self._durability)
        begins = [*begun[::2], time.time()]
        return [Call(0.0, 0.0, 0.0)] * made + [
            Call(began, executed, ended)
            for began, executed, ended in zip(begun[::2], begun[1::2], begins[1:], strict=True)
        ]


class LangGraph(Peer):
    """A step of a graph."""

    group = Group.CALLER
    pages = (
        "https://docs.langchain.com/oss/python/langgraph/durable-execution",
        "https://reference.langchain.com/python/langgraph.checkpoint.sqlite",
    )
    imports = ("langgraph.graph", "langgraph.checkpoint.sqlite")
    install = "pip install langgraph langgraph-checkpoint-sqlite"

    def __init__(self, durability: str) -> None:
        self._durability = durability
        self.name = f"langgraph-{durability}"
        self.title = f"LangGraph SqliteSaver, durability={durability}"
        self.setup = "One thread a run, one step of the graph a call; SqliteSaver. A restart loads the last checkpoint."

    async def serve(self, host: Host) -> Settings:
        """Start nothing; return the path of the database."""
        return {"path": str(host.folder / "langgraph.sqlite")}

    @asynccontextmanager
    async def caller(self, settings: Settings) -> AsyncIterator[GraphCaller]:
        """Open the database."""
        from langgraph.checkpoint.sqlite import SqliteSaver

        with SqliteSaver.from_conn_string(settings["path"]) as saver:
            saver.setup()
            yield GraphCaller(saver, self._durability)
