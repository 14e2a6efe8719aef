"""Records of effects that must happen only once.

Each effect is an owned execution of the workflow `tool-effect`. Its key names the session and the call. If the run dies
while the tool runs, the server knows that the effect may have happened, and doesn't hand it out again.
"""

from __future__ import annotations

from typing import Any

from durable_autogen.record.events import Frozen
from nexum_engine import jsontext
from nexum_engine.approvals import key_of
from nexum_engine.client import NexumClient
from nexum_engine.connection import OUTAGE_PATIENCE
from nexum_engine.records import Execution
from nexum_engine.workflow import RetryPolicy, workflow


class EffectInput(Frozen):
    """The input of an effect's execution: the call that makes it."""

    session: str
    agent: str
    tool: str
    arguments: dict[str, Any]
    """The arguments that the tool runs with, with the defaults filled in."""
    call: str
    """The part of the call's id that names the call in its session."""
    digest: str
    """The hash of the tool and the arguments that the model gave, without defaults and before a person's edit."""

    def __str__(self) -> str:
        return f"{self.tool}({jsontext.dump(self.arguments, 'the arguments')})"

    @property
    def key(self) -> str:
        """The idempotency key of the effect's execution."""
        return key_of(self.session, EFFECT, self.call)


EFFECT = "effect"
"""The name of the only node of an effect's execution."""
# The run reports every failure of the tool as final. Only an effect that has not begun is retried (`give_back_effect`).
_RETRY = RetryPolicy(max_attempts=1000)
TOOL_EFFECT = workflow("tool-effect", input=EffectInput).effect(EFFECT, once=True, retry=_RETRY).build()
TOOL_EFFECT_RECONCILED = (
    workflow("tool-effect", input=EffectInput).effect(EFFECT, once=True, reconcile=True, retry=_RETRY).build()
)


def of_session(session: str) -> str:
    """Return the key prefix of a session's effects."""
    return f"{session}:{EFFECT}/"


def kept_for(session: str, digest: str = "") -> str:
    """Return the key prefix of the results that a fork may reuse; with the `digest` of a call, only of equal calls."""
    return f"{session}:reuse/{digest}"


async def read_effects(client: NexumClient, key_prefix: str) -> list[tuple[EffectInput, Execution]]:
    """Return the effects whose keys begin with `key_prefix`, oldest first."""
    found = [
        (EffectInput.model_validate_json(one.input_json), one)
        async for one in client.all_executions(
            workflow_id=TOOL_EFFECT.workflow_id, key_prefix=key_prefix, with_nodes=True, patience=OUTAGE_PATIENCE
        )
    ]
    return found[::-1]
