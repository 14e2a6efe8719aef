"""Recording and replaying the calls of a program, whatever framework makes them.

Nothing in this folder imports AutoGen: `durable_autogen.autogen` says which methods record, and how.
"""
