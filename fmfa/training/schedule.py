"""Learning rates by epoch: the schedules of IRRA/FMFA and of IVT, set once at the start of each epoch."""

import math


def warmup_cosine(
    epoch: int, *, epochs: int, warmup_epochs: int = 5, warmup_factor: float = 0.1, final_factor: float = 0.0
) -> float:
    """Factor on the base learning rate: linear warm-up, then a cosine that starts where the warm-up ends.

    `epoch` counts from 0. Epoch e < `warmup_epochs` has `warmup_factor` + (1 - `warmup_factor`) *
    e / `warmup_epochs`; epoch `warmup_epochs` has 1; after `epochs` epochs the factor would be
    `final_factor`. This is the recipe of IRRA and FMFA (60 epochs, 5 of warm-up, from 0.1, down to 0).

    Raises:
        ValueError: `epoch` is negative.
    """
    if epoch < 0:
        raise ValueError(f"the schedule got epoch {epoch}, expected 0 or more")
    if epoch < warmup_epochs:
        return warmup_factor + (1 - warmup_factor) * epoch / warmup_epochs
    progress = min((epoch - warmup_epochs) / max(epochs - warmup_epochs, 1), 1.0)
    return final_factor + (1 - final_factor) * (1 + math.cos(math.pi * progress)) / 2


def ivt_cosine(
    epoch: int,
    *,
    base: float,
    epochs: int = 120,
    warmup_epochs: int = 5,
    warmup_rate: float = 5e-5,
    final_rate: float = 1e-5,
) -> float:
    """Learning rate (not a factor) of IVT's released recipe, for a parameter group with rate `base`.

    `epoch` counts from 0. The warm-up leads linearly from `warmup_rate` to `base`; the cosine's clock runs
    from epoch 0, not from the end of the warm-up, and ends at `final_rate` after `epochs` epochs, where it
    stays. Start and end are absolute rates, so a bias group of twice the base rate is not twice the curve.

    Raises:
        ValueError: `epoch` is negative.
    """
    if epoch < 0:
        raise ValueError(f"the schedule got epoch {epoch}, expected 0 or more")
    if epoch < warmup_epochs:
        return warmup_rate + epoch * (base - warmup_rate) / warmup_epochs
    if epoch >= epochs:
        return final_rate
    return final_rate + (base - final_rate) * (1 + math.cos(math.pi * epoch / epochs)) / 2
