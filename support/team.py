"""Build the demo's team. Two researchers work at the same time, and a writer answers from their reports."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from support.models import ModelChoice

if TYPE_CHECKING:
    from autogen_agentchat.agents import AssistantAgent
    from autogen_agentchat.base import Team

WRITER = "writer"
WRITER_MESSAGE = (
    "Two researchers have reported. Answer the user's question, in prose, from their reports alone. End with the list "
    "of the sources that you used, each with its URL."
)
ROLES = {
    "first_researcher": " Another researcher works beside you: take the first half of what the question needs.",
    "second_researcher": " Another researcher works beside you: take the second half of what the question needs.",
}


def build_team(model: ModelChoice, researcher: Callable[[str, str, tuple[int, int]], AssistantAgent]) -> Team:
    """Build the team as an AutoGen GraphFlow.

    `researcher` makes an agent from a name, a role and a share of the searches. (1, 2) means share 1 of 2.
    """
    from autogen_agentchat.agents import AssistantAgent
    from autogen_agentchat.teams import DiGraphBuilder, GraphFlow

    researchers = [researcher(name, role, (number, len(ROLES))) for number, (name, role) in enumerate(ROLES.items(), 1)]
    writer = AssistantAgent(WRITER, model.client(), system_message=WRITER_MESSAGE)
    builder = DiGraphBuilder().add_node(writer)
    for one in researchers:
        builder.add_node(one).add_edge(one, writer)
    return GraphFlow([*researchers, writer], builder.build())
