"""Three tools that charge a customer. They differ only in their policies, and in what the payment service offers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nexum_engine.policy import NOT_DONE, NotDone
from nexum_engine.workflow import Workflow, workflow
from support.charges.ledger import Ledger
from support.processes import kill_this_process
from support.tools import ToolContext, tool
from workflow import ToolCallInput, ToolCallOutput

LEDGER = "CHARGE_LEDGER"
"""The environment variable with the path of the ledger."""
CRASH = "CRASH_AFTER_CHARGE"
"""If this environment variable is set, the worker kills itself between a charge and its report."""


def drill_workflow(drill: str) -> Workflow:
    """Return the workflow of the drill with this name. Only the drill's own workers run its tool calls."""
    return workflow(f"charges-{drill}", input=ToolCallInput).effect("tool_call", ToolCallOutput).build()


def _ledger() -> Ledger:
    return Ledger(Path(os.environ[LEDGER]))


def _charge(customer: str, cents: int, key: str, *, once_per_reference: bool) -> str:
    receipt = _ledger().charge(customer, cents, key, once_per_reference=once_per_reference)
    if os.environ.get(CRASH):
        kill_this_process()
    return receipt


def find_charge(arguments: Mapping[str, Any], idempotency_key: str) -> str | NotDone:
    """Look the charge up in the ledger."""
    return _ledger().receipt(idempotency_key) or NOT_DONE


@tool(time_limit=10)
def charge_by_key(customer: str, cents: int, *, call: ToolContext) -> str:
    """Charge a customer. The payment service books each key once."""
    return _charge(customer, cents, call.idempotency_key, once_per_reference=True)


@tool(time_limit=10, effect="once", reconcile=find_charge)
def charge_and_find(customer: str, cents: int, *, call: ToolContext) -> str:
    """Charge a customer. The payment service books every request, and charges can be looked up."""
    return _charge(customer, cents, call.idempotency_key, once_per_reference=False)


@tool(time_limit=10, effect="once")
def charge_once(customer: str, cents: int, *, call: ToolContext) -> str:
    """Charge a customer. The payment service books every request, and only a person can look charges up."""
    return _charge(customer, cents, call.idempotency_key, once_per_reference=False)
