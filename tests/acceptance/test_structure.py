"""The layout of the project and the allowed imports, read from the sources."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from harness import ROOT, environment

SKIPPED = {"tests", "benchmarks"}


def modules() -> dict[str, Path]:
    """Return the path of every module of the project, by the module's name."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] in SKIPPED or any(part.startswith(".") or part in ("venv", "__pycache__") for part in parts):
            continue
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported(path: Path, *, at_import_time: bool = False, for_types: bool = False) -> set[str]:
    """Return the full names of the modules that a file imports.

    With `at_import_time`, ignore imports in functions. With `for_types`, count imports that only the type checker sees.
    """
    found: set[str] = set()
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            # The name after `import` may be a module or a name in a module: both look the same.
            found |= {
                f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in MODULES else str(node.module)
                for a in node.names
            }
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not for_types:
            pending += node.orelse
        elif not (at_import_time and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))):
            pending += ast.iter_child_nodes(node)
    return found


@cache
def imports_of(name: str) -> set[str]:
    """Return what a module imports. Reading all modules takes a second, so don't do it when pytest collects tests."""
    return imported(MODULES[name])


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def importers(*packages: str) -> set[str]:
    return {name for name in MODULES if any(within(target, *packages) for target in imports_of(name))}


def test_walk_finds_the_known_modules_and_imports() -> None:
    """If the walk found nothing, the other tests would pass without checking anything."""
    assert {"demo", "worker", "nexum_engine", "nexum_engine.store.sqlite", "nexum_engine.wire.nexum_pb2"} <= set(
        MODULES
    )
    assert "nexum_engine.store.sqlite" in imports_of("nexum_engine.store")
    assert "nexum_engine.server" in imports_of("nexum_engine.__main__")
    assert "nexum_engine.server" not in imported(MODULES["nexum_engine.__main__"], at_import_time=True)


# The layers of the engine. Each layer may import itself and the layers to its right.
ENGINE = {
    "errors": (),
    "clock": (),
    "ctrl_c": (),
    "streams": (),
    "screen": (),
    "options": (),
    "signals": (),
    "event_loop": ("errors",),
    "forks": (),
    "records": (),
    "jsontext": ("errors",),
    "settings": ("errors",),
    "workflow": ("settings", "jsontext", "records", "errors"),
    "policy": ("workflow", "settings", "jsontext", "errors"),
    "deadline": (),
    "scheduling": ("workflow", "records"),
    "report": ("records", "jsontext"),
    "location": ("errors", "streams"),
    "security": ("errors",),
    "wire": ("location", "errors"),
    "store": ("location", "scheduling", "workflow", "jsontext", "event_loop", "records", "errors", "clock"),
    "in_process": ("wire", "event_loop", "forks"),
    "server": (
        "in_process",
        "store",
        "wire",
        "security",
        "location",
        "workflow",
        "jsontext",
        "records",
        "errors",
        "clock",
    ),
    "published": ("wire", "records", "errors"),
    "channel": ("in_process", "wire", "security", "forks"),
    "connection": ("channel", "wire", "security", "event_loop", "location", "errors"),
    "client": (
        "published",
        "connection",
        "channel",
        "wire",
        "security",
        "workflow",
        "jsontext",
        "event_loop",
        "records",
        "errors",
    ),
    "heartbeat": ("event_loop", "forks", "connection", "channel", "wire", "location", "errors", "clock", "records"),
    "approvals": ("client", "connection", "policy", "workflow", "jsontext", "records", "errors"),
    "worker": ("heartbeat", "client", "connection", "workflow", "jsontext", "event_loop", "records", "errors", "clock"),
    "host": ("server", "event_loop", "forks", "client", "connection", "channel", "location", "errors"),
    "embedded": ("host", "event_loop", "client", "connection", "errors"),
    "server_or_database": (
        "client",
        "connection",
        "store",
        "location",
        "records",
        "jsontext",
        "clock",
        "errors",
    ),
    "commands": (
        "server_or_database",
        "client",
        "store",
        "report",
        "screen",
        "options",
        "location",
        "records",
        "jsontext",
        "clock",
        "errors",
    ),
    "maintenance": (
        "commands",
        "server_or_database",
        "client",
        "store",
        "report",
        "options",
        "location",
        "records",
        "errors",
    ),
    "owner": ("event_loop", "heartbeat", "client", "connection", "workflow", "jsontext", "records", "errors"),
}


def part(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def test_every_module_of_the_engine_has_a_layer() -> None:
    parts = {part(name) for name in MODULES if within(name, "nexum_engine")}
    assert parts == {*ENGINE, "__main__", "console_script", ""}


@pytest.mark.parametrize("name", sorted(name for name in MODULES if within(name, "nexum_engine")))
def test_the_engine_imports_downward_only(name: str) -> None:
    ours = {target for target in imports_of(name) if target.split(".")[0] in {one.split(".")[0] for one in MODULES}}
    assert {target for target in ours if not within(target, "nexum_engine")} == set(), "the engine knows no script"
    if part(name) in ("__main__", "console_script"):
        return
    allowed = {*ENGINE.get(part(name), ()), part(name), ""}
    assert {target for target in ours if part(target) not in allowed} == set()


def test_only_autogen_modules_import_autogen() -> None:
    for name in (name for name in MODULES if within(name, "durable_autogen.record")):
        assert {target for target in imports_of(name) if target.split(".")[0].startswith("autogen")} == set(), name
        ours = {target for target in imports_of(name) if within(target, "durable_autogen")}
        assert {one for one in ours if not within(one, "durable_autogen.record", "durable_autogen.errors")} == set()


def test_client_and_server_do_not_import_each_other() -> None:
    assert not importers("nexum_engine.server") & {"nexum_engine.client", "nexum_engine.worker"}
    assert {
        name for name in importers("nexum_engine.client", "nexum_engine.worker") if part(name) in ("server", "store")
    } == set()
    outside = {name for name in importers("nexum_engine.server") if part(name) != "server"}
    assert outside == {"nexum_engine.__main__", "nexum_engine.host"}
    # `host` imports the server's modules only when it starts a server itself. So a program that uses a running server
    # never imports these modules.
    assert not {one for one in imported(MODULES["nexum_engine.host"], at_import_time=True) if part(one) == "server"}


@pytest.mark.parametrize(
    ("package", "homes"),
    [
        (
            "sqlite3",
            {
                "nexum_engine.store.sqlite",
                "nexum_engine.store.sqlite_check",
                "nexum_engine.store.sqlite_connection",
                "nexum_engine.store.sqlite_file",
                "nexum_engine.store.sqlite_stamp",
            },
        ),
        (
            "psycopg",
            {
                "nexum_engine.store.postgresql",
                "nexum_engine.store.postgresql_connection",
                "nexum_engine.store.postgresql_servers",
            },
        ),
        ("genai_prices", {"durable_autogen.record.budget"}),
        ("grpc_tools", {"nexum_engine.wire.generate"}),
        ("grpclib", {"nexum_engine.wire.pure_python"}),
        ("ddgs", {"support.tools.web.search"}),
        ("markdownify", {"support.tools.web.html"}),
        ("bs4", {"support.tools.web.html"}),
        ("selectolax", {"support.tools.web.charset", "support.tools.web.html.tree"}),
        ("openai", {"support.models.live"}),
    ],
)
def test_package_is_imported_only_by_its_modules(package: str, homes: set[str]) -> None:
    assert importers(package) <= homes


def test_engine_and_tools_do_not_import_autogen() -> None:
    agents = importers("autogen_agentchat", "autogen_core", "autogen_ext")
    assert agents, "nobody imports AutoGen: the names have changed"
    assert {
        name for name in agents if within(name, "nexum_engine", "support.tools", "submit_task", "worker", "workflow")
    } == set()


SCRIPTS = {
    *("demo", "worker", "submit_task", "workflow"),
    *("crash_demo", "pipeline_worker", "pipeline_workflow"),
}
LIBRARIES = {"durable_autogen", "nexum_engine"}


def test_top_level_holds_the_scripts_their_support_and_two_libraries() -> None:
    assert {name.partition(".")[0] for name in MODULES} == {*SCRIPTS, "support", *LIBRARIES}


def test_library_imports_no_script_and_no_support() -> None:
    ours = {*SCRIPTS, "support", *LIBRARIES}
    for library, others in (("durable_autogen", {"nexum_engine"}), ("nexum_engine", set[str]())):
        targets = {target for name in MODULES if within(name, library) for target in imports_of(name)}
        assert {target.partition(".")[0] for target in targets} & ours <= {library, *others}, library


def test_support_imports_no_script_but_the_workflow_data() -> None:
    known = {target for name in MODULES if within(name, "support") for target in imports_of(name)}
    assert known & SCRIPTS <= {"pipeline_workflow", "workflow"}


def test_tools_and_offline_twins_do_not_import_durable_autogen() -> None:
    tools = [name for name in MODULES if within(name, "support.tools", "support.offline")]
    known = {target for name in tools for target in imports_of(name)}
    assert {target for target in known if within(target, "durable_autogen", "support.processes")} == set()
    # The offline web imports the tools' modules, as the live web does. The tools' modules don't import the offline web.
    assert {name for name in importers("support.offline") if within(name, "support.tools")} == set()
    # The module of a model's client is imported when the client is made, not when the model is chosen.
    assert imported(MODULES["support.models.choice"], at_import_time=True) & {*MODULES} == {"support.models.vendors"}


def test_imports_have_no_cycle() -> None:
    graph = {
        name: imported(path, at_import_time=True, for_types=True) & MODULES.keys() - {name}
        for name, path in MODULES.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None


@pytest.mark.parametrize(
    "script",
    [
        "demo.py",
        "worker.py",
        "crash_demo.py",
        "pipeline_worker.py",
        "support/graphflow/process.py",
        "support/charges/worker.py",
    ],
)
def test_help_does_not_import_autogen_ddgs_and_openai(script: str) -> None:
    program = (
        "import runpy, sys\n"
        f"sys.argv = [{script!r}, '--help']\n"
        "try:\n"
        f"    runpy.run_path({script!r}, run_name='__main__')\n"
        "finally:\n"
        "    heavy = ('autogen', 'ddgs', 'openai', 'markdownify')\n"
        "    print('HEAVY', sorted(name for name in sys.modules if name.split('_')[0].split('.')[0] in heavy))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60
    )
    assert (run.returncode, "usage:" in run.stdout) == (0, True), run.stderr
    assert run.stdout.splitlines()[-1] == "HEAVY []"
