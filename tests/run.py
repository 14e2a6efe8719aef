"""Everything that has to hold before a change lands: compile, ruff, strict types, the tests.

    python tests/run.py                    on this Python
    python tests/run.py --every-python     also some of the tests on the oldest and the newest Python of the machine

Ends at the first step that fails, with its exit code.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GROUPS = (
    # Some of these start embedded servers, which share one port: one after the other.
    (
        *("tests/engine/test_cli.py", "tests/durable/test_script.py", "tests/scripts/test_pipeline_worker.py"),
        *(f"tests/scripts/test_{name}.py" for name in ("crash_demo", "demo", "demo_children")),
        *(f"tests/acceptance/test_{name}.py" for name in ("crash_random", "crash_stages")),
    ),
    (
        *(f"tests/scripts/test_{name}.py" for name in ("demo_models", "demo_sessions", "graphflow")),
        *(f"tests/durable/test_{name}.py" for name in ("kills", "run_durable", "autogen_suite")),
    ),
)
"""They run beside each other and beside the rest: most of their time is waiting."""
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14", "3.15")
"""The versions that this project is for, the oldest first."""
OTHER_TESTS = tuple(
    f"tests/{folder}/test_{name}.py"
    for folder, names in {
        "engine": ("workflow", "jsontext", "report", "store", "sqlite"),
        "tools": ("declare", "contain", "page"),
        "scripts": ("session_file", "submit_task", "worker", "model_choice", "offline", "pipeline_steps", "console"),
        "durable": ("durable_session", "drift", "entry_points", "given_up", "order", "outside"),
        "acceptance": ("docs",),
    }.items()
    for name in names
)
"""What may differ between Pythons; the rest runs on one."""


def run(command: Sequence[str | Path]) -> None:
    """Run a step; end with its exit code if it fails."""
    print(f"\n$ {' '.join(map(str, command))}", flush=True)
    code = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, check=False).returncode
    if code != 0:
        sys.exit(code)


def run_together(*commands: Sequence[str | Path]) -> None:
    """Run steps at the same time, as most of their time is waiting; print what each said when all have ended."""
    with ExitStack() as stack:
        said = [stack.enter_context(tempfile.TemporaryFile()) for _ in commands]
        children = [
            subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
            for command, file in zip(commands, said, strict=True)
        ]
        try:
            codes = [child.wait() for child in children]
        finally:
            for child in children:
                child.kill()
        for command, file in zip(commands, said, strict=True):
            file.seek(0)
            print(f"\n$ {' '.join(map(str, command))}\n{file.read().decode('utf-8', 'replace')}", flush=True)
    if any(codes):
        sys.exit(max(codes))


def candidates(version: str) -> Iterator[str]:
    """Where a Python of this version may be: on the path, or among pyenv's."""
    if (found := shutil.which(f"python{version}")) is not None:
        yield found
    versions = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    yield from (str(path) for path in sorted(versions.glob(f"{version}.*/bin/python")))


def find_python(version: str) -> str | None:
    """A Python that runs and is of this version; None if the machine has none."""
    for candidate in candidates(version):
        probe = [candidate, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        answer = subprocess.run(probe, capture_output=True, text=True, check=False)
        if answer.returncode == 0 and answer.stdout.strip() == version:
            return candidate
    return None


def environment_of(python: str, folder: str) -> Path:
    """The interpreter of a new environment with what the tests need."""
    run([python, "-m", "venv", folder])
    own = Path(folder) / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    run([own, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", "tests/requirements.txt"])
    return own


def others() -> dict[str, str]:
    """Find the oldest and the newest Python of this machine, beside this one; print which versions aren't tested on."""
    own = f"{sys.version_info[0]}.{sys.version_info[1]}"
    found = {version: python for version in PYTHONS if (python := find_python(version)) is not None}
    chosen = {version: found[version] for version in [*found][:1] + [*found][-1:] if version != own}
    for version in PYTHONS:
        if version not in found and version != own:
            print(f"\nPython {version} is not on this machine: not tested on it", flush=True)
        elif version not in chosen and version != own:
            print(f"\nPython {version} is neither the oldest nor the newest here: not tested on it", flush=True)
    return chosen


def test_on(others: dict[str, str]) -> None:
    """Run some of the tests on these Pythons."""
    for version, python in others.items():
        with tempfile.TemporaryDirectory() as folder:
            print(f"\nPython {version} is {python}: testing on it", flush=True)
            # A cache of its own: others run at the same time.
            cache = ["-o", f"cache_dir={folder}/cache"]
            run_together([environment_of(python, folder), "-m", "pytest", "-q", *cache, *OTHER_TESTS])


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--every-python", action="store_true", help="also on the oldest and the newest of the machine")
    args = parser.parse_args()
    python = sys.executable
    run([python, "-m", "compileall", "-q", *(str(path) for path in sorted(ROOT.iterdir()) if is_source(path))])
    run([python, "-m", "ruff", "check", "."])
    run([python, "-m", "ruff", "format", "--check", "."])
    run([python, "-m", "mypy", "."])
    pytest = [python, "-m", "pytest", "-q"]
    with ThreadPoolExecutor() as beside:
        tested = beside.submit(test_on, others()) if args.every_python else None
        run_together(
            *([*pytest, "-o", f"cache_dir=.pytest_cache/{number}", *group] for number, group in enumerate(GROUPS)),
            [*pytest, *(f"--ignore={path}" for group in GROUPS for path in group)],
        )
        if tested is not None:
            tested.result()
    return 0


def is_source(path: Path) -> bool:
    """Whether a top-level entry is code of this project."""
    return path.suffix == ".py" or (path.is_dir() and not path.name.startswith((".", "venv", "_")))


if __name__ == "__main__":
    sys.exit(main())
