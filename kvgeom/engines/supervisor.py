"""Runs a command until its standard input ends, then stops it with all its children: no server outlives who started it.

The pipe that is the standard input is closed by the system however its owner ends, also when that is killed. This file is run by
path, in another process; it imports nothing of kvgeom.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

#: Seconds that a server has to end by itself.
GRACE = 10.0


def main(command: list[str]) -> int:
    """Run a command in a process group of its own; returns its status."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    threading.Thread(target=_stop_at_end_of_input, args=(process,), daemon=True).start()
    status = process.wait()
    _signal(process, kill=True)  # children that it has left behind
    return status if status >= 0 else 128 - status


def _stop_at_end_of_input(process: subprocess.Popen[bytes]) -> None:
    while os.read(0, 1024):
        pass
    _signal(process, kill=False)
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        _signal(process, kill=True)


def _signal(process: subprocess.Popen[bytes], *, kill: bool) -> None:
    try:
        if sys.platform == "win32":
            process.kill() if kill else process.terminate()
        else:
            os.killpg(process.pid, signal.SIGKILL if kill else signal.SIGTERM)
    except (ProcessLookupError, PermissionError):
        pass


if __name__ == "__main__":
    if sys.platform != "win32":
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the owner's; it ends the input
    sys.exit(main(sys.argv[1:]))
