"""Workflows as data: what the builder and the IR's parser refuse, versions, compatibility and scheduling."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from harness import ROOT, environment
from hypothesis import given, settings
from hypothesis import strategies as st

from nexum_engine.errors import InvalidRequest, TooLarge
from nexum_engine.records import Compatibility, NodeStatus
from nexum_engine.scheduling import settle
from nexum_engine.workflow import DEFAULT_RETRY_POLICY, MAX_NODES, RetryPolicy, compatibility, parse_ir, workflow

pytestmark = pytest.mark.every_python


def ir(**dependencies: list[str]) -> str:
    return json.dumps({"nodes": {node: {"type": "EFFECT", "dependencies": d} for node, d in dependencies.items()}})


# ---- The builder -----------------------------------------------------------------------------------------------------


def test_node_depends_on_all_earlier_nodes_by_default() -> None:
    built = workflow("w").effect("a").compute("b").effect("c", depends_on=["a"]).effect("d", depends_on=[]).build()
    assert json.loads(built.ir_json) == {
        "nodes": {
            "a": {"type": "EFFECT", "dependencies": []},
            "b": {"type": "COMPUTE", "dependencies": ["a"]},
            "c": {"type": "EFFECT", "dependencies": ["a"]},
            "d": {"type": "EFFECT", "dependencies": []},
        }
    }


def test_order_of_the_nodes_is_the_same_in_every_process() -> None:
    targets = [f"target-{number}" for number in range(8)]
    nodes: dict[str, dict[str, object]] = {name: {"type": "EFFECT", "dependencies": ["late"]} for name in targets}
    nodes["late"] = {"type": "EFFECT", "dependencies": [f"early-{number}" for number in range(8)]}
    nodes |= {f"early-{number}": {"type": "EFFECT"} for number in range(8)}
    for number in range(8):
        routes = [{"target": name} for name in targets]
        nodes[f"router-{number}"] = {"type": "ROUTER", "dependencies": ["late"], "routes": routes}
    ir_json = json.dumps({"nodes": nodes})
    program = "import sys; from nexum_engine.workflow import parse_ir; print(list(parse_ir(sys.argv[1])))"
    orders = {
        subprocess.run(
            [sys.executable, "-c", program, ir_json],
            cwd=ROOT,
            env=environment({"PYTHONHASHSEED": seed}),
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert orders == {f"{list(parse_ir(ir_json))}\n"}


def test_version_is_the_same_in_every_process() -> None:
    program = (
        "from nexum_engine.workflow import workflow; print(workflow('w').effect('a').effect('é').build().version_hash)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=environment({"PYTHONHASHSEED": "7"}),
        capture_output=True,
        text=True,
        check=True,
    )
    here = workflow("w").effect("a").effect("é").build().version_hash
    assert run.stdout.strip() == here
    # Compare with a constant: if the canonical form changed, no worker would take the tasks of older executions.
    assert here == "sha256:2bb89341dfd079141b2a7bf7e4470ad8c9227a33f0d68aa4bb3415612e29d5a4"


def test_equal_workflows_with_two_ids_have_two_versions() -> None:
    one, other = (workflow(name).effect("a").build() for name in ("one", "other"))
    assert one.ir_json == other.ir_json
    assert one.version_hash != other.version_hash


def test_changed_node_makes_a_new_version() -> None:
    hashes = {
        workflow("w").effect("a").effect("b").build().version_hash,
        workflow("w").effect("a").compute("b").build().version_hash,
        workflow("w").effect("a").effect("c").build().version_hash,
        workflow("w").effect("a").effect("b", depends_on=[]).build().version_hash,
    }
    assert len(hashes) == 4


@pytest.mark.parametrize("name", ["", "x" * 201, "a\nb", "a\x00b"], ids=["empty", "long", "newline", "nul"])
def test_bad_ids_are_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match="workflow_id"):
        workflow(name)
    with pytest.raises(InvalidRequest, match="a node's name"):
        workflow("w").effect(name).build()


def test_duplicate_node_name_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"two nodes with the same name: \['a', 'a'\]"):
        workflow("w").effect("a").effect("a").build()


def test_builder_names_the_argument_of_a_wrong_type() -> None:
    begun: Any = workflow("w").map("check")
    untyped: Any = workflow
    wrong: list[tuple[Callable[[], object], str]] = [
        (lambda: untyped(3), "workflow: workflow_id: Input should be a valid string (given: 3)"),
        (lambda: untyped("w", input=3), "workflow: input: Input should be a subclass of BaseModel (given: 3)"),
        (lambda: begun.effect(), "effect: node_id: Missing required argument"),
        (lambda: begun.effect(3), "effect: node_id: Input should be a valid string (given: 3)"),
        (lambda: begun.effect("a", 3), "effect: output: Input should be a subclass of BaseModel (given: 3)"),
        (
            lambda: begun.effect("a", depends_on="check"),
            "effect: depends_on: 'str' instances are not allowed as a Sequence value (given: 'check')",
        ),
        (lambda: begun.effect("a", depends_on=[3]), "effect: depends_on: Input should be a valid string (given: 3)"),
        (lambda: begun.effect("a", once=1), "effect: once: Input should be a valid boolean (given: 1)"),
        (
            lambda: begun.effect("a", retry={"max_attempts": 0}),
            "effect: retry.max_attempts: Input should be greater than or equal to 1 (given: 0)",
        ),
        (
            lambda: begun.compute("a", rate=3),
            "compute: rate: 3 is not a rate: use, for instance, 10/s, 10/min, 500/h or 3/10s",
        ),
        (lambda: begun.map(None), "map: node_id: Input should be a valid string (given: None)"),
        (lambda: begun.reduce("a", map_node_id=3), "reduce: map_node_id: Input should be a valid string (given: 3)"),
        (
            lambda: begun.subworkflow("a", 3),
            "subworkflow: sub_workflow_id: Input should be a valid string (given: 3)",
        ),
        (lambda: begun.timer("a", "3"), "timer: delay_seconds: Input should be a valid number (given: '3')"),
        (
            lambda: begun.human_approval("a", timeout_seconds=[]),
            "human_approval: timeout_seconds: Input should be a valid number (given: [])",
        ),
        (lambda: begun.event("a", 3), "event: name: Input should be a valid string (given: 3)"),
    ]
    for call, problem in wrong:
        with pytest.raises(InvalidRequest) as caught:
            call()
        assert str(caught.value) == problem
    for routes in (["b"], {"b": 3}):  # with other words in Pydantic 2.11
        with pytest.raises(InvalidRequest, match=r"^(router: routes|Route: condition).*: Input should be"):
            begun.router("a", routes)


def test_whole_number_of_seconds_has_another_version_than_a_decimal_one() -> None:
    assert '"delay_seconds":5,' in workflow("w").timer("a", 5).build().ir_json
    assert '"delay_seconds":5.0,' in workflow("w").timer("a", 5.0).build().ir_json


def test_workflow_without_nodes_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="no nodes"):
        workflow("w").build()


# ---- The IR ----------------------------------------------------------------------------------------------------------


def test_cycle_is_refused_and_named() -> None:
    with pytest.raises(InvalidRequest, match=r"cycle: .*(a -> b|b -> a)"):
        parse_ir(ir(a=["b"], b=["a"]))
    with pytest.raises(InvalidRequest, match="cycle: a -> a"):
        parse_ir(ir(a=["a"]))


def test_unknown_dependency_is_refused_with_both_names() -> None:
    with pytest.raises(InvalidRequest, match="'b' depends on 'nowhere'"):
        parse_ir(ir(a=[], b=["nowhere"]))


@pytest.mark.parametrize("kind", ["MAP_SUBTASK", "SLEEP", "effect", ""])
def test_unknown_node_type_is_refused(kind: str) -> None:
    with pytest.raises(InvalidRequest, match=f"node 'a' is of type '{kind}'.*EFFECT, COMPUTE, .* or EVENT"):
        parse_ir(json.dumps({"nodes": {"a": {"type": kind}}}))


@pytest.mark.parametrize(
    ("node", "problem"),
    [
        ({"type": "TIMER", "delay_seconds": -0.5}, "nodes.a.delay_seconds.*greater than or equal to 0"),
        ({"type": "TIMER", "delay_seconds": "5"}, "nodes.a.delay_seconds"),
        ({"type": "TIMER", "delay_seconds": 1e12}, "nodes.a.delay_seconds"),
        ({"type": "ROUTER"}, "ROUTER node 'a' has no routes"),
        ({"type": "ROUTER", "routes": [{"target": "x"}]}, "'a' routes to 'x', which is not a node"),
        ({"type": "ROUTER", "routes": [{"condition": "true"}]}, "nodes.a.routes.0.target"),
        ({"type": "ROUTER", "routes": [{"target": "a"}]}, "cycle: a -> a"),
        ({"type": "REDUCE", "mapNodeId": "x"}, "reduces 'x', which is not a MAP node"),
        ({"type": "REDUCE", "mapNodeId": "a"}, "reduces 'a', which is not a MAP node"),
        ({"type": "EVENT"}, "the event of node 'a' is empty"),
        ({"type": "EVENT", "event": "e", "on_timeout": "a"}, "'a' has on_timeout, but no timeout_seconds"),
        ({"type": "EVENT", "event": "e", "timeout_seconds": 1, "on_timeout": "x"}, "'a' routes to 'x'"),
        ({"type": "EFFECT", "timeout_seconds": 0}, "nodes.a.timeout_seconds"),
        ({"type": "EFFECT", "retry_policy": {"max_attempts": 0}}, "nodes.a.retry_policy.max_attempts"),
        ({"type": "EFFECT", "retry_policy": {"attempts": 3}}, "nodes.a.retry_policy.attempts"),
    ],
)
def test_node_that_can_not_run_is_refused_with_its_name(node: dict[str, object], problem: str) -> None:
    with pytest.raises(InvalidRequest, match=problem):
        parse_ir(json.dumps({"nodes": {"a": node}}))


def test_target_that_comes_before_its_router_is_a_cycle() -> None:
    nodes = {
        "ask": {"type": "EFFECT", "dependencies": []},
        "decide": {"type": "ROUTER", "dependencies": ["ask"], "routes": [{"target": "ask"}]},
    }
    with pytest.raises(InvalidRequest, match="cycle: "):
        parse_ir(json.dumps({"nodes": nodes}))


def test_builder_writes_the_ir_of_a_published_builder() -> None:
    built = (
        workflow("all")
        .effect("first")
        .router("decide", {"left": "$.ok == true", "right": "$.ok == false"})
        .compute("left", depends_on=["decide"])
        .compute("right", depends_on=["decide"])
        .map("each", depends_on=[])
        .reduce("sum")
        .subworkflow("child", "other", depends_on=["sum"])
        .timer("later", 1.5, depends_on=[])
        .human_approval("boss", depends_on=["later"])
        .build()
    )
    nodes = json.loads(built.ir_json)["nodes"]
    assert nodes["decide"]["routes"] == [
        {"condition": "$.ok == true", "target": "left"},
        {"condition": "$.ok == false", "target": "right"},
    ]
    assert nodes["sum"] == {"type": "REDUCE", "dependencies": ["each"], "mapNodeId": "each"}
    assert nodes["child"] == {"type": "SUBWORKFLOW", "dependencies": ["sum"], "subWorkflowId": "other"}
    assert nodes["later"] == {"type": "TIMER", "dependencies": [], "delay_seconds": 1.5}
    assert nodes["boss"] == {"type": "HUMAN_APPROVAL", "dependencies": ["later"]}
    assert nodes["first"] == {"type": "EFFECT", "dependencies": []}
    assert parse_ir(built.ir_json)["decide"].targets == ("left", "right")


def test_reduce_without_map_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="add a MAP node before it"):
        workflow("w").reduce("sum")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        '"nodes"',
        "{}",
        '{"nodes": []}',
        '{"nodes": {"a": 1}}',
        '{"nodes": {"a": {}}}',
        '{"nodes": {"a": {"type": "EFFECT", "dependencies": null}}}',
        '{"nodes": {"a": {"type": "EFFECT", "dependencies": [1]}}}',
        '{"nodes": {"a": {"type": "EFFECT", "weight": NaN}}}',
    ],
)
def test_malformed_ir_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(InvalidRequest, match="ir_json") as caught:
        parse_ir(text)
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)


def test_too_deep_or_too_large_ir_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="recursion limit"):
        parse_ir("[" * 100_000 + "]" * 100_000)
    with pytest.raises(TooLarge, match="the limit is 1,048,576 bytes"):
        parse_ir(" " * 1024 * 1024 + "{}")
    with pytest.raises(InvalidRequest, match="1,001 nodes; the limit is 1,000"):
        parse_ir(ir(**{f"n{n}": [] for n in range(MAX_NODES + 1)}))


def test_additional_fields_of_a_node_are_ignored() -> None:
    text = '{"nodes": {"a": {"type": "EFFECT", "dependencies": [], "retry": {"max": 3}}}, "version": 1}'
    assert list(parse_ir(text)) == ["a"]


# ---- Compatibility ---------------------------------------------------------------------------------------------------

BASE = ir(a=[], b=["a"], c=["a", "b"])


@pytest.mark.parametrize(
    ("new", "expected"),
    [
        (BASE, Compatibility.IDENTICAL),
        (ir(a=[], b=["a"], c=["b", "a"]), Compatibility.IDENTICAL),
        (ir(c=["a", "b", "a"], b=["a"], a=[]), Compatibility.IDENTICAL),
        (ir(a=[], b=["a"], c=["a", "b"], d=["c"]), Compatibility.SAFE),
        (ir(a=[], b=["a"]), Compatibility.BREAKING),
        (ir(a=[], b=[], c=["a", "b"]), Compatibility.BREAKING),
        (ir(a=[], b=["a"], c=["a", "b", "d"], d=[]), Compatibility.BREAKING),
        (BASE.replace("EFFECT", "COMPUTE", 1), Compatibility.BREAKING),
    ],
    ids=["same", "reordered", "repeated", "added", "removed", "dependency removed", "dependency added", "type"],
)
def test_compatibility_compares_new_version_with_old(new: str, expected: Compatibility) -> None:
    assert compatibility(parse_ir(BASE), parse_ir(new)) is expected


# ---- Scheduling ------------------------------------------------------------------------------------------------------


@st.composite
def _graphs(draw: st.DrawFn) -> dict[str, list[str]]:
    names = [f"n{n}" for n in range(draw(st.integers(1, 12)))]
    graph = {
        name: draw(st.lists(st.sampled_from(names[:at]), unique=True)) if at else [] for at, name in enumerate(names)
    }
    order = draw(st.permutations(names))
    return {name: graph[name] for name in order}


@settings(max_examples=100, deadline=None)
@given(graph=_graphs(), data=st.data())
def test_every_graph_runs_in_order_to_its_end(graph: dict[str, list[str]], data: st.DataObject) -> None:
    definition = parse_ir(ir(**graph))
    status = dict.fromkeys(definition, NodeStatus.PENDING)
    done: list[str] = []
    while len(done) < len(graph):
        settled = settle(definition, status, {})
        assert set(settled.values()) == {NodeStatus.READY}, f"nothing is ready after {done}"
        chosen = data.draw(st.sampled_from(sorted(settled)))
        assert set(graph[chosen]) <= set(done)
        status[chosen] = NodeStatus.COMPLETED
        done.append(chosen)
    assert settle(definition, status, {}) == {}


@pytest.mark.parametrize("seconds", [math.nan, math.inf])
def test_delay_or_time_limit_that_is_not_finite_is_refused(seconds: float) -> None:
    for builder in (workflow("w").timer("t", seconds), workflow("w").effect("e", timeout_seconds=seconds)):
        with pytest.raises(InvalidRequest, match="'w' has a delay or time limit that is not a finite number"):
            builder.build()


def test_default_retry_delays_are_1_2_and_4_seconds() -> None:
    assert [DEFAULT_RETRY_POLICY.delay_ms(n) for n in (1, 2, 3, 4)] == [1000, 2000, 4000, None]


def test_retry_delay_grows_up_to_its_maximum() -> None:
    jittered = {RetryPolicy(first_delay_seconds=10, jitter=0.5).delay_ms(1) for _ in range(100)}
    assert len(jittered) > 1
    assert all(delay is not None and 5000 <= delay <= 10_000 for delay in jittered)
    retry = RetryPolicy(max_attempts=1000, first_delay_seconds=0.5, factor=10, max_delay_seconds=60)
    assert [retry.delay_ms(n) for n in (1, 2, 3, 4, 999, 1000)] == [500, 5000, 50_000, 60_000, 60_000, None]
