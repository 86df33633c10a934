"""Nothing that the package starts outlives a killed process that started it."""

import os
import subprocess
import sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

# Starts CODE, kills it when it has so many descendants, and counts those that are left after a while. Orphans become
# children of this process where the system knows how, as they become the session manager's on a desktop.
KILL = """
import ctypes, contextlib, subprocess, sys, time, psutil
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
code, wanted, pause = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
started = subprocess.Popen([sys.executable, "-c", code])
while len(found := psutil.Process(started.pid).children(recursive=True)) < wanted:
    assert started.poll() is None
    time.sleep(0.05)
time.sleep(pause)
started.kill()
started.wait()
gone, left = psutil.wait_procs(found, timeout=20)
for process in left:
    process.kill()
print(len(left))
"""
GENERATION = """
import sys
from fmfa.simpedes.generate import generate, recipe
generate(sys.argv[1], recipe("large"), workers=2, progress=False)
"""
CHECK = """
import sys
from pathlib import Path
from PIL import Image
from fmfa.data.check import decode_pictures
Image.new("RGB", (3000, 3000)).save(Path(sys.argv[1], "large.png"))
decode_pictures(Path(sys.argv[1]), ["large.png"] * 100_000, False)
"""
LOADER = """
import time
from fmfa.data.pairs import make_loader
class Numbers(list):
    collate = list
for batch in make_loader(Numbers(range(10)), [[number] for number in range(10)], workers=2):
    time.sleep(60)
"""
NOTEBOOK = """
import sys
from fmfa.notebook import run_notebook
run_notebook(sys.argv[1] + "/sleep.ipynb", sys.argv[1] + "/out.ipynb")
"""


@pytest.mark.parametrize(
    ("code", "processes", "pause"),
    [(GENERATION, 2, 1), (CHECK, 2, 1), (LOADER, 2, 1), (NOTEBOOK, 1, 0), (NOTEBOOK, 1, 6)],
    ids=["generation", "check", "loader", "starting kernel", "kernel"],
)
def test_what_a_killed_process_started_ends(code, processes, pause, tmp_path):
    nbformat.write(new_notebook(cells=[new_code_cell("import time; time.sleep(600)")]), tmp_path / "sleep.ipynb")
    code = code.replace("sys.argv[1]", repr(str(tmp_path)))
    command = [sys.executable, "-c", KILL, code, str(processes), str(pause)]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=200, check=False)
    assert done.stdout == "0\n", done.stderr
