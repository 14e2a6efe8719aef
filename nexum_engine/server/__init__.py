"""The Nexum server: `run_server` opens the store, listens, serves and stops."""

from nexum_engine.server.access import Tokens
from nexum_engine.server.bounds import Limits
from nexum_engine.server.run import run_server
from nexum_engine.server.tls import ServerTls

__all__ = ["Limits", "ServerTls", "Tokens", "run_server"]
