"""Command: copy what the tables read, `python -m fmfa.results RUNS TARGET`."""

import sys

from fmfa.results.files import export_results

if __name__ == "__main__":
    export_results(*sys.argv[1:3])
