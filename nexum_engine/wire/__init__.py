"""The gRPC code of proto/nexum.proto, which `generate.py` generates, and the metadata and status codes of calls."""
