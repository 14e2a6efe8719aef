"""Recording and replaying the calls of a program, whatever framework makes them.

Nothing in this folder imports AutoGen: `durable_autogen.autogen` defines which methods are recorded, and how.
"""
