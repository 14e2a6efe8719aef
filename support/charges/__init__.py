"""Kill workers between a tool's charge and the record of this charge, under three policies."""
