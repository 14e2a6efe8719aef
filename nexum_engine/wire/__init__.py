"""The gRPC code that `generate.py` makes from proto/nexum.proto, and the metadata and status codes of calls."""
