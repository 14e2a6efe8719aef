"""A worker whose effects are lines of a ledger, a file that stands for the outside world. Each policy has a workflow.

A payment is one line: the name of the workflow, and the idempotency key. After a payment, the handler waits until the
gate, a file, exists.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from pathlib import Path

from nexum_engine.client import NexumClient
from nexum_engine.errors import UnknownEffect
from nexum_engine.signals import stop_event
from nexum_engine.worker import Binding, TaskContext, Worker
from nexum_engine.workflow import Workflow, workflow

REPEATED = workflow("repeated").effect("pay").build()
ONCE = workflow("once").effect("pay", once=True).build()
RECONCILED = workflow("reconciled").effect("pay", once=True, reconcile=True).build()
UNSURE = workflow("unsure").effect("pay", once=True, reconcile=True).build()
WORKFLOWS = (REPEATED, ONCE, RECONCILED, UNSURE)


def payments(ledger: Path) -> list[str]:
    """Return the names of the workflows that have paid, in order."""
    return [line.split(" ")[0] for line in ledger.read_text().splitlines()] if ledger.exists() else []


def bindings(ledger: Path, gate: Path) -> list[Binding]:
    """Return the workflows with their handlers."""

    def binding(built: Workflow) -> Binding:
        def pay_and_wait(task: TaskContext) -> str:
            line = f"{built.workflow_id} {task.idempotency_key}\n"
            if task.must_reconcile:
                if built is UNSURE:
                    raise UnknownEffect("the ledger is locked")
                if line in ledger.read_text():
                    return "found in the ledger"
            descriptor = os.open(ledger, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            os.write(descriptor, line.encode())
            os.close(descriptor)
            while not gate.exists():
                time.sleep(0.005)
            return "paid"

        async def pay(task: TaskContext) -> str:
            return await asyncio.to_thread(pay_and_wait, task)

        return Binding(built, {"pay": pay})

    return [binding(built) for built in WORKFLOWS]


async def main(address: str, ledger: Path, gate: Path) -> None:
    """Run the worker for the server with this address."""
    stop = stop_event()
    async with NexumClient(address) as client:
        await Worker(client, bindings(ledger, gate), concurrency=8).run(stop)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
    asyncio.run(main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])))
