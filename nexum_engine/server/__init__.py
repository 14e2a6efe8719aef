"""The embedded Nexum server: `run_server` opens the store, listens, serves and stops."""

from nexum_engine.server.run import DEFAULT_LISTEN, run_server

__all__ = ["DEFAULT_LISTEN", "run_server"]
