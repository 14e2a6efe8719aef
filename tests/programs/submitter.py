"""A program that uses submit_task: `submitter.py SESSION TIMEOUT TOOL JSON...` prints one line for each result.

It submits from four threads. An error is also printed as a line; the exit code is then 1.
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor

from nexum_engine.errors import NexumError
from submit_task import submit_tool_call
from support.console import say


def main(session_id: str, timeout: str, tool_name: str, *calls: str) -> int:
    def submit(arguments: str) -> bool:
        try:
            result = submit_tool_call(tool_name, json.loads(arguments), session_id, float(timeout))
        except NexumError as error:
            say(f"ERROR {type(error).__name__} {error}")
            return False
        say(f"RESULT {result}")
        return True

    with ThreadPoolExecutor(4) as pool:
        return 0 if all(list(pool.map(submit, calls))) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
