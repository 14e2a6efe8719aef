"""Recording and replaying of a program's calls, for any framework.

Nothing in this folder imports AutoGen: `durable_autogen.autogen` defines which methods are recorded, and how.

Each call comes to `Recorder.call` (recorder.py). If the call is on record, `Replay.run` (replay.py) compares it with
the recorded call, and delivers the recorded outcome in its turn. Otherwise `Recorder._make_and_record` makes the call,
and `Journal.record` (journal.py) stores the outcome. What is stored is defined in events.py, and `read_record` reads
it. Read these four files first: each of the others is for one kind of call, or for what can happen to a call.

Two kinds of recorded calls have no turn, and are compared where they are asked for: a call that the program gave up
(`Recorder._wait_to_be_given_up`), and a line that was typed at the console (`Recorder.typed_before`).
"""
