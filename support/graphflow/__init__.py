"""The comparison of `crash_demo.py --graphflow`: how an interrupted GraphFlow resumes without and with a record."""
