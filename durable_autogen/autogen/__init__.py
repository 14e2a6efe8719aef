"""The AutoGen part: which of its methods are recorded, and how calls, replies and messages are written."""
