"""Run scripts in forks of a process that has loaded torch and Detectron2, which takes seconds.

A request is a line of JSON on the standard input: `arguments`, the script and what follows it, and
`output`, the file for what it prints. The answer is a line with its exit status.
"""

from __future__ import annotations

import json
import os
import runpy
import sys

import iou_d2.commands.detect
import iou_d2.commands.train  # noqa: F401  (both for what they load)


def next_request() -> dict:
    """In a fork, the request that it is for; the process itself waits for the next one."""
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            return json.loads(line)
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    sys.exit()


def main() -> None:
    request = next_request()
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    sys.stdin = open(os.devnull)
    sys.argv = request["arguments"]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
