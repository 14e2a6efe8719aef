"""AutoGen on durable execution: what an agent calls is recorded before the agent sees it.

    from durable_autogen import DurableTool
    agent = AssistantAgent(..., tools=[DurableTool(tool, session) for tool in TOOLS.values()])

This package knows AutoGen and `submit_task`; the engine knows neither.
"""

from durable_autogen.tools import DurableTool

__all__ = ["DurableTool"]
