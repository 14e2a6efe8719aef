"""What becomes of an interrupted AutoGen GraphFlow, without and with a record; `crash_demo.py --graphflow` shows it."""
