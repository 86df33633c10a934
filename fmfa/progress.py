"""The package's progress bar: visible to a person, quiet in batch runs."""

import os

from tqdm.auto import tqdm


def progress_bar(total: int, description: str, unit: str, *, shown: bool = True) -> tqdm:
    """A bar for a terminal or a notebook, removed when it is done; use it in a `with` statement.

    The notebook runner sets TQDM_DISABLE for its kernels. tqdm's widget ignores that variable, so it is
    obeyed here.

    Args:
        total: number of units.
        description: what is being done.
        unit: what is counted, in the plural.
        shown: False makes it silent.
    """
    silent = not shown or os.environ.get("TQDM_DISABLE", "0") not in ("", "0")
    return tqdm(total=total, desc=description, unit=f" {unit}", leave=False, disable=silent)
