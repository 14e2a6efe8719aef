"""Recording of AutoGen: the recorded methods, and the written form of calls, replies and messages."""
