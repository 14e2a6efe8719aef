"""The embedded Nexum server, its client and its worker runtime."""
