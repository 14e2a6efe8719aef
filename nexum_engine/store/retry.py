"""The transition that continues a FAILED execution.

It runs inside one transaction, and is the same for every database.
"""

from __future__ import annotations

from nexum_engine.errors import Conflict, ExecutionNotFound
from nexum_engine.records import ExecutionStatus
from nexum_engine.store.db import Db
from nexum_engine.store.ids import number_of
from nexum_engine.store.results import Changed, Changes
from nexum_engine.store.tasks import advance


def retry_execution(db: Db, execution_id: str) -> Changed:
    """Continue a FAILED execution at its failed node, with fresh counts of failures. Recorded results are kept.

    The nodes that the failure had cancelled wait again for what they depend on. Raises ExecutionNotFound for an unknown
    id, and Conflict if the execution has not failed, if its key has a newer execution, or if it is owned.
    """
    number = number_of(db, execution_id)
    row = db.one("execution_without_input", execution=number, execution_id=execution_id)
    if row is None:
        raise ExecutionNotFound(execution_id)
    if row["status"] != ExecutionStatus.FAILED:
        raise Conflict(f"execution {execution_id} is {row['status']}: only a FAILED one can be retried")
    if (key := row["idempotency_key"]) is not None:
        newest = db.one("execution_of_key", workflow_id=row["workflow_id"], idempotency_key=key)
        assert newest is not None, "the execution itself has the key"
        if newest["execution_id"] != execution_id:
            # Whatever its status: a start with the key finds the newest execution, and no other may run beside it.
            next_step = ": retry that one" if newest["status"] == ExecutionStatus.FAILED else ""
            raise Conflict(
                f"execution {execution_id} can't be retried: its key has a newer execution, {newest['execution_id']}, "
                f"which is {newest['status']}{next_step}"
            )
    owned = db.one("owned_node", execution=number)
    if owned is not None and owned["owned"]:
        raise Conflict(
            f"execution {execution_id} is the work of a program, and no worker would get it: run that program again"
        )
    db.run("retry_execution", execution=number)
    db.run("reopen_nodes", execution=number)
    changes = Changes()
    advance(db, number, row["version_hash"], changes)
    return changes.freeze()
