"""The Nexum server: `run_server` opens the store, listens, serves and stops."""

from nexum_engine.server.run import run_server

__all__ = ["run_server"]
