"""Generate this folder's gRPC code from proto/nexum.proto.

    python -m nexum_engine.wire.generate

The command needs grpcio-tools 1.71 and, for the type stubs, mypy-protobuf. grpcio-tools 1.71 has no wheels for Python
3.14 or later. Later versions of grpcio-tools generate code that needs protobuf 6, but AutoGen needs protobuf 5.
tests/requirements.txt installs both packages on Python 3.10 to 3.13.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import sysconfig
from importlib.resources import files
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROTO_DIR = HERE.parent.parent / "proto"
GENERATED = ("nexum_pb2.py", "nexum_pb2.pyi", "nexum_pb2_grpc.py", "nexum_pb2_grpc.pyi")


def generate(target: Path) -> None:
    """Write the files named in `GENERATED` to `target`.

    Raises RuntimeError if the generator isn't installed or refuses proto/nexum.proto.
    """
    try:
        from grpc_tools import protoc
    except ModuleNotFoundError as error:
        raise RuntimeError(
            "grpcio-tools is not installed: generate with Python 3.10 to 3.13, in an environment made from "
            "tests/requirements.txt"
        ) from error

    status = protoc.main(
        [
            "protoc",
            f"-I{PROTO_DIR}",
            f"-I{files('grpc_tools') / '_proto'}",
            f"--python_out={target}",
            f"--grpc_python_out={target}",
            *_plugin("protoc-gen-mypy"),
            *_plugin("protoc-gen-mypy_grpc"),
            f"--mypy_out=quiet:{target}",
            f"--mypy_grpc_out=quiet:{target}",
            "nexum.proto",
        ]
    )
    if status != 0:
        raise RuntimeError(f"protoc refused {PROTO_DIR / 'nexum.proto'} (exit status {status})")
    for stub in (target / "nexum_pb2_grpc.py", target / "nexum_pb2_grpc.pyi"):
        # Fix the import: protoc's absolute import resolves only if the folder itself is on sys.path.
        text = stub.read_text(encoding="utf-8").replace("import nexum_pb2", "from nexum_engine.wire import nexum_pb2")
        stub.write_text(text, encoding="utf-8")


def _plugin(name: str) -> list[str]:
    # Look in the scripts folder of this Python, because the folder may be missing from PATH.
    found = shutil.which(name, path=sysconfig.get_path("scripts"))
    return [f"--plugin={name}={found}"] if found else []


if __name__ == "__main__":
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()
    generate(HERE)
    print(f"wrote {', '.join(GENERATED)} to {HERE}", file=sys.stderr)
