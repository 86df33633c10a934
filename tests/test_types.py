import subprocess
import sys

from fmfa.files import PROJECT


def test_the_types_of_the_package_agree():
    run = subprocess.run([sys.executable, "-m", "mypy"], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
