"""Recording and replaying of a program's calls, for any framework.

Nothing in this folder imports AutoGen: `durable_autogen.autogen` defines which methods are recorded, and how.
"""
