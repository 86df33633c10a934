"""The package's progress bar: visible to a person, quiet in batch runs."""

import os
import sys

from tqdm.auto import tqdm


def progress_bar(total: int, description: str, unit: str, *, initial: int = 0, shown: bool = True) -> tqdm:
    """A bar for a terminal or a notebook, removed when it is done; use it in a `with` statement.

    It stays silent where nobody looks: when the error stream is no terminal, and under the notebook runner, which
    sets TQDM_DISABLE for its kernels (tqdm's widget ignores that variable, so it is obeyed here).

    Args:
        total: number of units.
        description: what is being done.
        unit: what is counted, in the plural.
        initial: units done before.
        shown: False makes it silent.
    """
    silent = not shown or os.environ.get("TQDM_DISABLE", "0") not in ("", "0")
    in_notebook = "ipykernel" in sys.modules
    disable = True if silent else (False if in_notebook else None)
    return tqdm(total=total, initial=initial, desc=description, unit=f" {unit}", leave=False, disable=disable)
