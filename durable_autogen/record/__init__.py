"""Recording and replaying of a program's calls, for any framework.

Nothing in this folder imports AutoGen: `durable_autogen.autogen` defines which methods are recorded, and how.

Each call comes to `Recorder.call` (recorder.py). If the call is on record, `Replay.run` (replay.py) compares it with
the recorded call, and delivers the recorded outcome in its turn. Otherwise `Recorder._make_and_record` makes the call,
and `Journal.record` (journal.py) stores the outcome. What is stored is defined in events.py, and `read_record` reads
it.

Two kinds of recorded calls have no turn, and are compared where they are asked for: a call that the program gave up
(`Recorder._wait_to_be_given_up`), and a line that was typed at the console (`Recorder.typed_before`).

Read these four files first. The others are:

- the frame of a run: session.py opens and ends it, place.py knows which session and agent make a call, pending_call.py
  holds a call in progress, log.py;
- kinds of calls: waits.py and sent_events.py; console.py for `input()`; guard.py for tools and models with a policy,
  with attempts.py (retries, limits), effects.py (`effect="once"`) and terminal.py (approvals); budget.py; questions.py
  for calls that wait for a person;
- what can happen to a call: setbacks.py (it fails or is given up), failures.py (exceptions as JSON), cleanup.py
  (Ctrl+C), unrecorded.py (connections and processes outside the record);
- helpers: idle.py finds out when a session is idle, with threads.py and activity.py; storable.py writes values as JSON;
  tasks.py, while_open.py.
"""
