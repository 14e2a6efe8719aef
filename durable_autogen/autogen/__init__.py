"""Recording of AutoGen programs: the methods to record, and the recorded form of calls, replies and messages.

- entry_points.py names AutoGen's methods with their wrappers, and wrapping.py wraps them.
- A wrapper records a call with `Calls` (calls.py, streams.py), a turn or run of an agent or team with `AtWork`
  (agent_at_work.py), and a stop with `check` (conditions.py).
- Each call gets a fingerprint (fingerprints.py), and a replay compares fingerprints (differences.py).
- values.py writes results as JSON and reads them. transcript.py gives messages ids and times that last.
- session_state.py holds what a session knows of its agents, and policies.py what it knows of tools with a policy.
"""
