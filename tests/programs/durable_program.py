"""A program with a durable agent or team: `durable_program.py SHAPE SESSION MODEL_URL LOG [--on-drift ...]`.

The tools log each effect in LOG. The program prints the final transcript as one line: `TRANSCRIPT ` and JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import logging
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from autogen_agentchat.agents import AssistantAgent, UserProxyAgent
from autogen_agentchat.base import ChatAgent, TaskResult, Team
from autogen_agentchat.conditions import MaxMessageTermination, TextMentionTermination
from autogen_agentchat.messages import BaseChatMessage
from autogen_agentchat.teams import (
    DiGraphBuilder,
    GraphFlow,
    MagenticOneGroupChat,
    RoundRobinGroupChat,
    SelectorGroupChat,
    Swarm,
)
from autogen_agentchat.tools import AgentTool

from durable_autogen import DurableSession, run_durable_stream
from nexum_engine.errors import NexumError
from support.models.live import LiveModel

TASK = "Find it out."


class Program:
    """The agents and teams. Each agent has its own model client, and a tool that logs under the agent's name."""

    def __init__(self, model_url: str, log: str, *, system: str, stream: bool, model: str) -> None:
        self.model_url, self.log, self.system, self.stream, self.model = model_url, log, system, stream, model

    def client(self, model: str = "") -> LiveModel:
        return LiveModel(
            vendor="OpenAI-compatible server", model=model or self.model, base_url=self.model_url, api_key="k"
        )

    def tool(self, name: str) -> Callable[[str], str]:
        log = self.log

        def note(text: str) -> str:
            """Write the text down."""
            time.sleep(random.random() * 0.02)
            descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            os.write(descriptor, f"{name} {text}\n".encode())
            os.close(descriptor)
            if "fail" in text:
                raise ValueError(f"no: {random.random()}")
            return f"{name} noted {text} {random.random()}"

        return note

    def agent(self, name: str, *, tools: bool = True, helpers: Sequence[AgentTool] = (), **more: Any) -> AssistantAgent:
        return AssistantAgent(
            name,
            self.client(f"{self.model}-{name}"),
            description=f"{name}, a member",
            tools=[*([self.tool(name)] if tools else []), *helpers] or None,
            system_message=f"{self.system} You are {name}.",
            max_tool_iterations=6,
            model_client_stream=self.stream,
            **more,
        )

    def build(self, shape: str, session: str) -> ChatAgent | Team:
        built: ChatAgent | Team = self.random_team(session) if shape == "random" else getattr(self, shape)()
        return built

    def single(self) -> ChatAgent:
        return self.agent("alone")

    def round_robin(self) -> Team:
        return RoundRobinGroupChat([self.agent("a"), self.agent("b")], termination_condition=MaxMessageTermination(5))

    def selector(self) -> Team:
        return SelectorGroupChat(
            [self.agent("a"), self.agent("b"), self.agent("c")],
            model_client=self.client(f"{self.model}-selector"),
            termination_condition=MaxMessageTermination(5),
        )

    def swarm(self) -> Team:
        agents: list[ChatAgent] = [self.agent("a", handoffs=["b"]), self.agent("b", handoffs=["a"])]
        return Swarm(agents, termination_condition=MaxMessageTermination(6))

    def sequential(self) -> Team:
        agents = [self.agent(name) for name in "abcd"]
        builder = DiGraphBuilder()
        for agent in agents:
            builder.add_node(agent)
        for one, other in itertools.pairwise(agents):
            builder.add_edge(one, other)
        return GraphFlow(list(agents), builder.build())

    def fan_out(self) -> Team:
        a, b, c, e, d = (self.agent(name) for name in "abced")
        builder = DiGraphBuilder()
        for agent in (a, b, c, e, d):
            builder.add_node(agent)
        for middle in (b, c, e):
            builder.add_edge(a, middle).add_edge(middle, d)
        return GraphFlow([a, b, c, e, d], builder.build())

    def cyclic(self) -> Team:
        a, b, c = (self.agent(name) for name in "abc")
        builder = DiGraphBuilder()
        builder.add_node(a).add_node(b).add_node(c)
        builder.add_edge(a, b)
        builder.add_edge(b, a, condition=lambda message: "DONE" not in message.to_model_text())
        builder.add_edge(b, c, condition=lambda message: "DONE" in message.to_model_text())
        builder.set_entry_point(a)
        return GraphFlow([a, b, c], builder.build(), termination_condition=MaxMessageTermination(30))

    async def own(self, task: str) -> list[str]:
        """Run two agents in turn without a team; return the texts."""
        a = AssistantAgent(
            "a",
            self.client(f"{self.model}-a"),
            tools=[self.tool("a")],
            max_tool_iterations=6,
            model_client_stream=self.stream,
        )
        b = self.agent("b")
        said = [task]
        for agent in (a, b, a, b):
            result = await agent.run(task=said[-1])
            said += [message.to_text() for message in result.messages[1:]]
        return said

    def magentic(self) -> Team:
        return MagenticOneGroupChat([self.agent("a"), self.agent("b")], model_client=self.client(), max_turns=4)

    def random_team(self, seed: str) -> Team:
        """Return a random team. A seed always gives the same team."""
        rng = random.Random(seed)
        names = "abcde"[: rng.randint(3, 5)]
        members: list[ChatAgent | Team] = []
        for name in names:
            self.stream = rng.random() < 0.5
            if rng.random() < 0.25:
                helper = self.agent(f"helper_{name}", tools=False)
                members.append(self.agent(name, tools=False, helpers=[AgentTool(helper)]))
            else:
                members.append(self.agent(name, tools=rng.random() < 0.8))
        kind = rng.choice(["round_robin", "nested", "selector", "graph", "graph"])
        if kind == "graph":
            return self._random_graph(members, rng)
        end = MaxMessageTermination(rng.randint(4, 8))
        if kind == "selector":
            client = self.client(f"{self.model}-selector")
            return SelectorGroupChat(members[:3], model_client=client, termination_condition=end)
        if kind == "nested":
            inner = RoundRobinGroupChat(members[1:], max_turns=rng.randint(1, 3), name="inner")
            return RoundRobinGroupChat([members[0], inner], termination_condition=end)
        return RoundRobinGroupChat(members, termination_condition=end)

    def _random_graph(self, members: list[Any], rng: random.Random) -> Team:
        builder = DiGraphBuilder()
        for member in members:
            builder.add_node(member)
        for number, member in enumerate(members[1:], 1):
            for before in rng.sample(members[:number], rng.randint(1, number)):
                builder.add_edge(before, member)
        return GraphFlow(members, builder.build())

    def person(self) -> Team:
        def ask(prompt: str) -> str:
            with open(self.log, "a", encoding="utf-8") as log:
                log.write("person asked\n")
            return f"I say {random.random()}"

        return RoundRobinGroupChat(
            [self.agent("a"), UserProxyAgent("person", input_func=ask)],
            termination_condition=TextMentionTermination("NEVER") | MaxMessageTermination(5),
        )


def transcript(result: TaskResult) -> list[dict[str, Any]]:
    """Return the result's messages as JSON, without the ids of input requests."""
    return [message.model_dump(mode="json", exclude={"request_id"}) for message in result.messages]


async def main(argv: list[str] | None = None) -> int:
    """Run the program; return its exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("shape")
    parser.add_argument("session")
    parser.add_argument("model_url")
    parser.add_argument("log")
    parser.add_argument("--task", default=TASK)
    parser.add_argument("--system", default="Be brief.")
    parser.add_argument("--model", default="m")
    parser.add_argument("--stream", action="store_true")
    parser.add_argument("--on-drift", default="stop")
    parser.add_argument("--uvloop", action="store_true")  # read by `run_on_loop`
    args = parser.parse_args(argv)
    program = Program(args.model_url, args.log, system=args.system, stream=args.stream, model=args.model)
    try:
        if args.shape == "own":
            async with DurableSession(args.session, on_drift=args.on_drift):
                said = await program.own(args.task)
            print("TRANSCRIPT " + json.dumps(said), flush=True)
            return 0
        async for item in run_durable_stream(
            lambda: program.build(args.shape, args.session),
            task=args.task,
            session_id=args.session,
            on_drift=args.on_drift,
        ):
            if isinstance(item, TaskResult):
                print("TRANSCRIPT " + json.dumps(transcript(item)), flush=True)
            elif isinstance(item, BaseChatMessage):
                print(f"MESSAGE {item.source} {item.metadata.get('nexum', 'live')}", flush=True)
    except NexumError as error:
        print(f"ERROR {type(error).__name__} {error}", flush=True)
        return 3
    return 0


def run_on_loop(argv: list[str]) -> int:
    """Run the program on asyncio's event loop, or on uvloop; return its exit code."""
    if "--uvloop" in argv:
        import uvloop

        loop = uvloop.new_event_loop()
        try:
            return loop.run_until_complete(main(argv))
        finally:
            loop.close()
    return asyncio.run(main(argv))


if __name__ == "__main__":
    logging.basicConfig(level=logging.ERROR)
    logging.getLogger("autogen_core").setLevel(logging.CRITICAL)
    sys.exit(run_on_loop(sys.argv[1:]))
