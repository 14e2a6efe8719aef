"""The rows of benchmarks/compare.py: one file for each engine, and the parts that they share."""

from __future__ import annotations

from peers.absurd_peer import Absurd
from peers.autogen_peer import PlainAutoGen
from peers.base import Peer
from peers.dbos_peer import DbosQueue, DbosStep
from peers.langgraph_peer import LangGraph
from peers.nexum_peer import NexumOwner, NexumSession, NexumWorker, PublishedNexum
from peers.procrastinate_peer import Procrastinate
from peers.restate_peer import Restate
from peers.temporal_peer import Temporal

ALL: tuple[Peer, ...] = (
    PlainAutoGen(),
    NexumOwner(),
    NexumSession(),
    DbosStep(postgres=False),
    DbosStep(postgres=True),
    LangGraph("sync"),
    LangGraph("async"),
    NexumWorker(),
    PublishedNexum(),
    DbosQueue(postgres=False),
    DbosQueue(postgres=True),
    Procrastinate(),
    Absurd(),
    Restate(),
    Temporal(),
)
