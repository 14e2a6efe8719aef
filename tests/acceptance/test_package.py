"""The package: the wheel's contents, matching lists of requirements, and a run that needs only the installed wheel."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path
from typing import NamedTuple

import pytest
from harness import ROOT, environment, free_port, running
from packaging.requirements import Requirement

from nexum_engine import VERSION

LIBRARIES = ("durable_autogen", "nexum_engine")
DISTRIBUTION = f"nexum_durable_autogen-{VERSION}"
NOT_PACKAGED = {"nexum_engine/wire/generate.py"}
"""A module that needs the source tree."""
CALLED_OTHERWISE = {
    "google": "protobuf",
    "grpc": "grpcio",
    "grpc_health": "grpcio-health-checking",
    "pydantic_core": "pydantic",
}
"""For each import whose distribution has another name: the distribution. pydantic also installs pydantic_core."""


def call(*command: str | Path, cwd: Path) -> str:
    """Run a command that must succeed; return its output."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment({"PYTHONPATH": ""}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


# ---- Building --------------------------------------------------------------------------------------------------------


class Built(NamedTuple):
    """The files that a build has made."""

    wheel: Path
    sdist: Path


def build(tree: Path, target: Path, *kinds: str) -> None:
    """Build the wheel or the sdist with the backend that pyproject.toml names."""
    backend = re.search(r'^build-backend = "(\w+)\.build"$', (tree / "pyproject.toml").read_text(), re.MULTILINE)
    assert backend is not None
    options = [option for kind in kinds for option in ("-t", kind)]
    call(sys.executable, "-m", backend[1], "build", "-d", target, *options, cwd=tree)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The wheel and the sdist, built from a copy of this tree to which a user has added files."""
    tree = tmp_path_factory.mktemp("source") / "tree"
    unwanted = shutil.ignore_patterns(".git", ".venv", "venv", ".*_cache")
    shutil.copytree(ROOT, tree, ignore=unwanted, symlinks=True)
    for name in ("nexum_engine/__pycache__/client.pyc", ".nexum/local.db", ".session-s1.json"):
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).touch()
    dist = tmp_path_factory.mktemp("dist")
    build(tree, dist, "wheel", "sdist")
    return Built(dist / f"{DISTRIBUTION}-py3-none-any.whl", dist / f"{DISTRIBUTION}.tar.gz")


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def metadata_of(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        return Parser().parsestr(archive.read(f"{DISTRIBUTION}.dist-info/METADATA").decode("utf-8"))


def test_wheel_holds_the_two_libraries_and_nothing_else(built: Built) -> None:
    sources = {
        path.relative_to(ROOT).as_posix()
        for library in LIBRARIES
        for path in (ROOT / library).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    about = {f"{DISTRIBUTION}.dist-info/{name}" for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt")}
    about.add(f"{DISTRIBUTION}.dist-info/licenses/LICENSE")
    assert names_in(built.wheel) == sources - NOT_PACKAGED | {"nexum_engine/wire/nexum.proto"} | about


def test_wheel_holds_sql_the_contract_and_typed_markers(built: Built) -> None:
    """These files aren't Python sources, so a change of the build loses them most easily."""
    needed = {
        *(f"{library}/py.typed" for library in LIBRARIES),
        "nexum_engine/store/queries.sql",
        "nexum_engine/store/sqlite_migrations/0001_initial.sql",
        "nexum_engine/wire/nexum.proto",
        *(f"nexum_engine/wire/nexum_pb2{end}" for end in (".py", ".pyi", "_grpc.py", "_grpc.pyi")),
    }
    assert needed - names_in(built.wheel) == set()
    with zipfile.ZipFile(built.wheel) as archive:
        assert archive.read("nexum_engine/wire/nexum.proto") == (ROOT / "proto" / "nexum.proto").read_bytes()


def test_sdist_builds_the_same_wheel(built: Built, tmp_path: Path) -> None:
    with tarfile.open(built.sdist) as archive:
        assert all(Path(name).parts[0] == DISTRIBUTION and ".." not in name for name in archive.getnames())
        archive.extractall(tmp_path, filter="data")
    tree = tmp_path / DISTRIBUTION
    assert {path.name for path in tree.iterdir()} == {
        *(*LIBRARIES, "proto", "README.md", "CHANGELOG.md", "LICENSE"),
        *("pyproject.toml", "PKG-INFO", ".gitignore"),  # added by the backend
    }
    build(tree, tmp_path / "dist", "wheel")
    assert (tmp_path / "dist" / built.wheel.name).read_bytes() == built.wheel.read_bytes()


def test_metadata_names_version_license_and_python(built: Built) -> None:
    metadata = metadata_of(built.wheel)
    assert (metadata["Name"], metadata["Version"]) == ("nexum-durable-autogen", VERSION)
    assert (metadata["License-Expression"], metadata["Requires-Python"]) == ("MIT", ">=3.10")
    assert metadata.get_all("Provides-Extra") == ["dev", "postgres", "prices", "uvloop"]
    assert metadata.get_all("Project-URL") is None


def test_changelog_begins_with_this_version() -> None:
    versions = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert versions[0] == VERSION


# ---- Requirements ----------------------------------------------------------------------------------------------------


def listed(file: Path) -> set[str]:
    """Return the requirements of a file in a normal form, without those of the files that it includes."""
    lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in file.read_text(encoding="utf-8").splitlines())
    return {str(Requirement(line)) for line in lines if line and not line.startswith("-r ")}


def packaged(wheel: Path, extra: str) -> set[str]:
    """Return the requirements of an extra, or those of the package itself if `extra` is ''."""
    found = set()
    for text in metadata_of(wheel).get_all("Requires-Dist") or []:
        plain, _, of = text.partition("extra == ")
        if of.strip("'\"") == extra:
            found.add(str(Requirement(re.sub(r"\s*(;|and)\s*$", "", plain))))
    return found


def test_package_and_requirement_files_agree(built: Built) -> None:
    """The package requires what the libraries need. Its extra `dev` requires the rest of both requirements files."""
    scripts, tests = listed(ROOT / "requirements.txt"), listed(ROOT / "tests" / "requirements.txt")
    own, dev = packaged(built.wheel, ""), packaged(built.wheel, "dev")
    assert own - scripts == set(), "requirements.txt must list what the package needs, with the same range"
    assert dev == (scripts | tests) - own, "the extra dev must list the rest of both files, with the same ranges"


def test_package_requires_what_its_libraries_import_and_nothing_else(built: Built) -> None:
    imported = set()
    for path in (path for library in LIBRARIES for path in (ROOT / library).rglob("*.py")):
        if path.relative_to(ROOT).as_posix() in NOT_PACKAGED:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(str(node.module).partition(".")[0])
    others = imported - {*sys.stdlib_module_names, *LIBRARIES}
    needed = {CALLED_OTHERWISE.get(name, name.replace("_", "-")) for name in others}
    optional = {
        Requirement(text).name for extra in ("postgres", "prices", "uvloop") for text in packaged(built.wheel, extra)
    }
    assert needed - optional == {Requirement(text).name for text in packaged(built.wheel, "")}


def test_backend_of_the_tests_is_the_one_that_pip_fetches() -> None:
    required = re.search(r'^requires = \["(.*)"\]$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert required is not None
    assert str(Requirement(required[1])) in listed(ROOT / "tests" / "requirements.txt")


# ---- Installed -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def commands(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The commands' folder in a virtual environment that has the wheel, and otherwise uses this Python's packages."""
    folder = tmp_path_factory.mktemp("environment")
    call(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    found = folder / ("Scripts" if sys.platform == "win32" else "bin")
    python = found / "python"
    packages = Path(call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    ours = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (packages / "dependencies.pth").write_text("\n".join(ours) + "\n", encoding="utf-8")
    install = ("install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check")
    call(sys.executable, "-m", "pip", "--python", python, *install, built.wheel, cwd=folder)
    return found


def test_nexum_command_shows_its_help_and_version(commands: Path, tmp_path: Path) -> None:
    assert call(commands / "nexum", "--help", cwd=tmp_path).startswith("usage: nexum [-h]")
    assert call(commands / "nexum", "--version", cwd=tmp_path) == f"Nexum engine {VERSION}\n"
    assert list(tmp_path.iterdir()) == []


def test_nexum_command_has_the_commands_that_packages_add(commands: Path, tmp_path: Path) -> None:
    assert call(commands / "nexum", "budget", "--help", cwd=tmp_path).startswith("usage: python -m durable_autogen bud")


def test_program_in_an_empty_folder_runs_durably_on_a_server_of_the_nexum_command(
    commands: Path, tmp_path: Path
) -> None:
    shutil.copy(ROOT / "tests" / "programs" / "installed_program.py", tmp_path / "program.py")
    alone = {"PYTHONPATH": ""}
    with running(
        ["--listen", f"127.0.0.1:{free_port()}"], program=commands / "nexum", cwd=tmp_path, env=alone
    ) as nexum:
        address = nexum.wait_for_address()
        outputs = []
        for _ in range(2):
            with running(["program.py", "s1", address], program=commands / "python", cwd=tmp_path, env=alone) as run:
                assert run.wait() == 0, run.output
            outputs.append(run.lines)
    first, second = outputs
    assert (first[-1], second[-1]) == ("reply 1", "reply 1")
    assert (tmp_path / "calls").read_text() == "called\n"


def test_every_public_name_is_imported_from_the_installed_package(commands: Path, tmp_path: Path) -> None:
    program = "from durable_autogen import *; import durable_autogen, nexum_engine; print(durable_autogen.__file__)"
    file = Path(call(commands / "python", "-c", program, cwd=tmp_path).strip())
    assert file.is_relative_to(commands.parent)


# ---- For contributors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", ".github/workflows/test.yml"])
def test_page_has_the_test_command_of_the_readme(page: str) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^python3 -m venv .* tests/run\.py$", readme, re.MULTILINE)
    assert command in (ROOT / page).read_text(encoding="utf-8")


def test_contributing_names_files_and_modules_that_exist() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    files = set(re.findall(r"`([\w./]+/[\w.]*|[\w./]+\.(?:md|py|sql|toml|txt|proto))`", page))
    assert {"proto/nexum.proto", "support/", "nexum_engine/store/sqlite_migrations/"} <= files
    assert {name for name in files - {"0004_what_it_does.sql"} if not (ROOT / name).exists()} == set()
    modules = set(re.findall(r"python -m (nexum_engine[\w.]+)", page))
    assert modules == {"nexum_engine.wire.generate"}
