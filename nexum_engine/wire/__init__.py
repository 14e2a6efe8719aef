"""Generated gRPC code for proto/nexum.proto; `generate.py` makes it."""
