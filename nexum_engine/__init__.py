"""Nexum, embedded: a durable execution engine over gRPC, its client and its worker runtime.

    python -m nexum_engine          start the server

In a program: `nexum_engine.workflow` defines workflows as data, `nexum_engine.client.NexumClient` starts and awaits
executions, `nexum_engine.worker.Worker` runs their nodes. Errors are in `nexum_engine.errors`.
"""

import os

# Turn off grpcio's own support for forks, before grpcio is imported and reads the variable. That support restarts
# threads in the child, and these crash if a call was open at the fork. The child uses wire/pure_python.py instead.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
# Turn grpc's log off: this package's errors report the same failures.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

VERSION = "0.1.0"
DEFAULT_LISTEN = "127.0.0.1:50051"
DEFAULT_LEASE = 30.0  # seconds
DEFAULT_MAX_CALLS = 20_000
DEFAULT_MAX_QUEUE = 100_000
