"""Recording of AutoGen programs: the methods to record, and the recorded form of calls, replies and messages."""
