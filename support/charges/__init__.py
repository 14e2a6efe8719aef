"""Kill workers between the effect of a tool and its record: a tool that charges, under three policies."""
