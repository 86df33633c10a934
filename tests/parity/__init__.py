"""`python -m tests.parity FILE.npz`: does this implementation compute what the released ones compute?

Reads a file of reference numbers, computes every quantity in it again and prints the difference of each,
max |ours - theirs| / max |theirs|. The exit status is 0 when all are within their limits (1e-4, and 1e-6
for references in float64), 1 when one is not, 2 when the file cannot be used.
"""

import argparse
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fmfa.errors import CheckpointError, FmfaError
from tests.parity.fmfa import fmfa_rows, is_fmfa_file
from tests.parity.ivt import is_ivt_file, ivt_rows
from tests.parity.row import Row

READERS = ((is_fmfa_file, fmfa_rows), (is_ivt_file, ivt_rows))


def parity_rows(path: str | Path) -> list[Row]:
    """All rows of a parity file of either model.

    Returns:
        (quantity, difference, limit) of every quantity in the file.

    Raises:
        FmfaError: not a readable file of a known layout.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise FmfaError(f"{path}: expected a .npz file of reference numbers: {error}") from error
    for recognises, rows in READERS:
        if recognises(arrays):
            try:
                return list(rows(arrays))
            except KeyError as error:
                raise FmfaError(f"{path}: lacks the entry {error}, which its layout needs") from error
            except CheckpointError as error:
                raise CheckpointError(f"{path}: {error}") from error
    raise FmfaError(
        f"{path}: of no known layout; expected entries under clip/ (FMFA) or state_dict/encoder_vl. (IVT), "
        f"found {', '.join(list(arrays)[:5]) or 'none'}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__.splitlines()[0])
    parser.add_argument("file", help="reference numbers, a .npz file")
    path = parser.parse_args(arguments).file
    try:
        rows = parity_rows(path)
    except FmfaError as error:
        print(error, file=sys.stderr)
        return 2
    width = max(len(name) for name, _, _ in rows)
    for name, difference, limit in rows:
        print(f"{name:{width}}  {difference:9.2e}  {'ok' if difference <= limit else f'ABOVE {limit:g}'}")
    failed = sum(difference > limit for _, difference, limit in rows)
    worst = max(rows, key=lambda row: row[1] / row[2])
    print(
        f"{len(rows)} quantities, {failed} above the limit; closest to it: {worst[0]} ({worst[1]:.2e} of {worst[2]:g})"
    )
    return 1 if failed else 0
