"""The rows of benchmarks/compare.py: one file for each engine, and the parts that they share."""

from __future__ import annotations

from peers.autogen_peer import PlainAutoGen
from peers.base import Peer
from peers.dbos_peer import DbosQueue, DbosStep
from peers.nexum_peer import NexumOwner, NexumSession, NexumWorker, PublishedNexum

ALL: tuple[Peer, ...] = (
    PlainAutoGen(),
    NexumOwner(),
    NexumSession(),
    DbosStep(postgres=False),
    DbosStep(postgres=True),
    NexumWorker(),
    PublishedNexum(),
    DbosQueue(postgres=False),
    DbosQueue(postgres=True),
)
