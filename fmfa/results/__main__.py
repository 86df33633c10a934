"""Command: copy what the tables read, `python -m fmfa.results RUNS TARGET`."""

import argparse
import sys

from fmfa.errors import ConfigError
from fmfa.results.files import export_results


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status: 0 copied, 2 nothing to copy."""
    parser = argparse.ArgumentParser(prog="python -m fmfa.results", description="Copy what the tables read of runs.")
    parser.add_argument("runs", help="folder with one folder per run, such as runs/standard")
    parser.add_argument("target", help="folder that the runs are added to, such as data/results/standard")
    options = parser.parse_args(arguments)
    try:
        written = export_results(options.runs, options.target)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.target}: {len(written)} runs copied")
    return 0


if __name__ == "__main__":
    sys.exit(main())
