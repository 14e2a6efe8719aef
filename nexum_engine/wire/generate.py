"""Generate this folder's gRPC code from proto/nexum.proto.

    python -m nexum_engine.wire.generate

Needs grpcio-tools 1.71, which requirements.txt names (later ones generate for protobuf 6, which can't be imported beside
AutoGen), and for the type stubs mypy-protobuf, which tests/requirements.txt names.
"""

from __future__ import annotations

import shutil
import sys
import sysconfig
from importlib.resources import files
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROTO_DIR = HERE.parent.parent / "proto"
GENERATED = ("nexum_pb2.py", "nexum_pb2.pyi", "nexum_pb2_grpc.py", "nexum_pb2_grpc.pyi")


def generate(target: Path) -> None:
    """Write the files named in `GENERATED` to `target`. Raises RuntimeError if protoc refuses the contract."""
    from grpc_tools import protoc

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
    stub = target / "nexum_pb2_grpc.py"
    # protoc writes an absolute import, which only resolves when the folder itself is on sys.path.
    text = stub.read_text(encoding="utf-8").replace("import nexum_pb2 as", "from nexum_engine.wire import nexum_pb2 as")
    stub.write_text(text, encoding="utf-8")
    for name in GENERATED:
        path = target / name
        if name.endswith("_grpc.pyi"):
            stubs = path.read_text(encoding="utf-8").replace(
                "import nexum_pb2", "from nexum_engine.wire import nexum_pb2"
            )
            path.write_text(stubs, encoding="utf-8")


def _plugin(name: str) -> list[str]:
    # Beside this Python: its folder need not be on PATH.
    found = shutil.which(name, path=sysconfig.get_path("scripts"))
    return [f"--plugin={name}={found}"] if found else []


if __name__ == "__main__":
    generate(HERE)
    print(f"wrote {', '.join(GENERATED)} to {HERE}", file=sys.stderr)
