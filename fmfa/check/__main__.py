"""`python -m fmfa.check ROOT`: print the data check of one data set."""

import argparse
import sys

from fmfa.check import check_dataset
from fmfa.data.annotations import read_dataset
from fmfa.errors import FmfaError


def main(arguments: list[str] | None = None) -> int:
    """Print table and verdict; returns 0, 1 when something is fatal, 2 when nothing could be checked.

    Raises:
        SystemExit: wrong arguments (status 2), or `--help`.
    """
    parser = argparse.ArgumentParser(prog="python -m fmfa.check", description="Check a data set before training.")
    parser.add_argument("root", nargs="?", default="", help="annotation file, or the folder that holds it")
    parser.add_argument("--name", help="CUHK-PEDES, ICFG-PEDES, RSTPReid, SimPEDES, or one's own")
    parser.add_argument("--images", help="image folder (default: imgs beside the annotation file)")
    parser.add_argument("--drop-empty-captions", action="store_true", help="leave captions without a word out")
    parser.add_argument("--workers", type=int, help="processes that decode pictures (default: one a processor)")
    options = parser.parse_args(arguments)
    if not options.root.strip():
        parser.error("give the folder of the data set or its annotation file, such as /data/CUHK-PEDES")
    try:
        dataset = read_dataset(
            options.root,
            options.name,
            images=options.images,
            drop_empty_captions=options.drop_empty_captions,
        )
        report = check_dataset(dataset, workers=options.workers, progress=sys.stderr.isatty())
    except FmfaError as error:
        print(f"The data set cannot be checked: {error}", file=sys.stderr)
        return 2
    for row in report.table.itertuples():
        print(f"{row.severity:8}{row.count:>9,}  {row.check}: {row.detail}")
    print(report.verdict)
    return int(report.fatal)


if __name__ == "__main__":
    sys.exit(main())
