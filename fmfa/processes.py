"""Processes that end with the one that started them.

`python -m fmfa.processes PROCESS MODULE [ARGUMENT ...]` runs a module so; PROCESS is the other process' number.
"""

import os
import runpy
import sys
import threading
import time
from contextlib import suppress

import psutil


def end_with(process: int) -> None:
    """Make this process end within a second of another, even when that one is killed and can tell nobody.

    Args:
        process: number of the other process, on this machine.
    """

    def watch() -> None:
        with suppress(psutil.NoSuchProcess):
            other = psutil.Process(process)
            while other.is_running() and other.status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    end_with(int(sys.argv[1]))
    del sys.argv[:2]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
