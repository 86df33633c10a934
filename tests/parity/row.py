"""One row of a parity table: how far a computed quantity is from its reference."""

import numpy as np
from torch import Tensor

LIMITS = {np.dtype(np.float32): 1e-4, np.dtype(np.float64): 1e-6}
Row = tuple[str, float, float]  # quantity, difference, limit


def compare(name: str, ours: Tensor | np.ndarray | float | None, theirs: np.ndarray) -> Row:
    """The difference max |ours - theirs| / max |theirs| of a quantity, and its limit.

    Args:
        name: of the quantity.
        ours: None where it is not computed.
        theirs: float64 references have the limit 1e-6, others 1e-4.

    Returns:
        (name, difference, limit). The difference is infinite where ours is not computed or of another shape and
        where either holds a number that is not finite; it is absolute where the reference is 0 everywhere.
    """
    limit = LIMITS.get(theirs.dtype, 1e-4)
    if isinstance(ours, Tensor):
        ours = ours.detach().cpu().numpy()
    if ours is None or np.shape(ours) != theirs.shape:
        return name, float("inf"), limit
    ours, theirs = np.asarray(ours, dtype=np.float64), theirs.astype(np.float64)
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        return name, float("inf"), limit
    gap = np.abs(ours - theirs)
    return name, float(gap.max(initial=0.0) / (np.abs(theirs).max(initial=0.0) or 1.0)), limit
