"""Everything that has to hold before a change lands: compile, ruff, strict types, the tests.

    python tests/run.py                    on this Python
    python tests/run.py --every-python     also some of the tests on Python 3.10 and 3.13, where the machine has them

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
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTEST = ("-m", "pytest", "-q", "-n", "2")
OTHER_PYTHONS = ("3.10", "3.13")
OTHER_TESTS = tuple(
    f"tests/test_{name}.py"
    for name in (
        *("engine_workflow", "engine_jsontext", "engine_report", "engine_store", "engine_sqlite", "session_file"),
        *("submit_task", "worker", "demo_models", "tools_declare", "tools_run", "tools_page_text"),
        *("model_choice", "rehearsal", "pipeline_steps"),
    )
)
"""What may differ between Pythons; the rest runs on one."""


def run(command: Sequence[str | Path]) -> None:
    """Run a step; end with its exit code if it fails."""
    print(f"\n$ {' '.join(map(str, command))}", flush=True)
    code = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, check=False).returncode
    if code != 0:
        sys.exit(code)


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


def test_on(version: str) -> None:
    """Run some of the tests in a new environment of another Python."""
    python = find_python(version)
    if python is None:
        print(f"\nPython {version} is not on this machine: not tested on it", flush=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        run([python, "-m", "venv", folder])
        own = Path(folder) / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
        run([own, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", "tests/requirements.txt"])
        run([own, *PYTEST, *OTHER_TESTS])


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--every-python", action="store_true", help=f"also on {' and '.join(OTHER_PYTHONS)}")
    args = parser.parse_args()
    python = sys.executable
    run([python, "-m", "compileall", "-q", *(str(path) for path in sorted(ROOT.iterdir()) if is_source(path))])
    run([python, "-m", "ruff", "check", "."])
    run([python, "-m", "ruff", "format", "--check", "."])
    run([python, "-m", "mypy", "."])
    run([python, *PYTEST])
    if args.every_python:
        for version in OTHER_PYTHONS:
            if version != f"{sys.version_info[0]}.{sys.version_info[1]}":
                test_on(version)
    return 0


def is_source(path: Path) -> bool:
    """Whether a top-level entry is code of this project."""
    return path.suffix == ".py" or (path.is_dir() and not path.name.startswith((".", "venv", "_")))


if __name__ == "__main__":
    sys.exit(main())
