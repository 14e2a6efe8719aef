"""The comparison of `crash_demo.py --graphflow`: an interrupted AutoGen GraphFlow, without and with a record."""
