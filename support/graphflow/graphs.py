"""The comparison's two graphs of four agents: a chain and a loop. Each graph has a point of interruption."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autogen_agentchat.base import TerminationCondition
    from autogen_agentchat.teams import GraphFlow
    from autogen_core.models import ChatCompletionClient

TASK = "Write two sentences on why idempotency keys matter."
MAX_MESSAGES = 20  # more than either graph needs
REVISE, APPROVED = "REVISE", "APPROVED"
REVISIONS = 2  # the number of drafts that the reviewer rejects


@dataclass(frozen=True)
class Graph:
    """A graph of four agents. The comparison interrupts it before reply number `at_reply` of the agent `at_agent`."""

    name: str
    agents: Mapping[str, str]  # each agent's system message by the agent's name
    at_agent: str
    at_reply: int
    how: str

    def team(
        self, clients: Callable[[str], ChatCompletionClient], until: TerminationCondition | None = None
    ) -> GraphFlow:
        """Build the team. `clients` makes an agent's model client. The condition `until` can end the team early."""
        from autogen_agentchat.agents import AssistantAgent
        from autogen_agentchat.conditions import MaxMessageTermination
        from autogen_agentchat.teams import DiGraphBuilder, GraphFlow

        chain = [
            AssistantAgent(name, clients(name), system_message=message, description=name)
            for name, message in self.agents.items()
        ]
        builder = DiGraphBuilder()
        for agent in chain:
            builder.add_node(agent)
        if self is CYCLIC:
            planner, author, reviewer, publisher = chain
            builder.add_edge(planner, author, activation_group="start")
            builder.add_edge(author, reviewer)
            builder.add_edge(reviewer, author, activation_group="again", condition=_wants_changes)
            builder.add_edge(reviewer, publisher, condition=lambda message: not _wants_changes(message))
        else:
            for one, other in itertools.pairwise(chain):
                builder.add_edge(one, other)
        enough = MaxMessageTermination(MAX_MESSAGES)
        return GraphFlow(list(chain), builder.build(), termination_condition=enough | until if until else enough)


def _wants_changes(message: Any) -> bool:
    return REVISE in message.to_model_text()


IN_A_ROW = Graph(
    name="a chain",
    agents={
        "researcher": "List three facts on the question, briefly.",
        "analyst": "Pick the two facts that matter most, and say why in one sentence.",
        "editor": "Write the two sentences that were asked for.",
        "publisher": "Give the text a title and print both.",
    },
    at_agent="analyst",
    at_reply=1,
    how="while the analyst works",
)
CYCLIC = Graph(
    name="a loop",
    agents={
        "planner": "Say in one sentence what the text has to contain.",
        "author": "Write the text, or write it anew as the reviewer says. Only the text.",
        "reviewer": f"Answer the first {REVISIONS} drafts with {REVISE}: and one wish, the next one with {APPROVED}.",
        "publisher": "Give the approved text a title and print both.",
    },
    at_agent="author",
    at_reply=2,
    how=f"between two rounds, after the reviewer's first {REVISE}",
)
