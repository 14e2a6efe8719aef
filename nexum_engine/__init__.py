"""Nexum, embedded: a durable execution engine over gRPC, its client and its worker runtime.

    python -m nexum_engine          start the server

In a program: `nexum_engine.workflow` defines workflows as data, `nexum_engine.client.NexumClient` starts and awaits
executions, `nexum_engine.worker.Worker` runs their nodes. Errors are in `nexum_engine.errors`.
"""

VERSION = "0.1.0"
DEFAULT_LISTEN = "127.0.0.1:50051"
