"""How strongly each loss pulls at the features that the losses share."""

import torch

from fmfa.models.distributed import total, world_size
from fmfa.models.interfaces import ModelOutput


def gradient_norms(output: ModelOutput) -> dict[str, float]:
    """L2 norm of the gradient that each loss sends into each shared feature, over all ranks.

    Returns:
        "LOSS/FEATURE" -> norm; 0 where a loss does not reach a feature.
    """
    names, features = zip(*output.features.items(), strict=True)
    squares = []
    for loss in output.losses.values():
        gradients = torch.autograd.grad(loss, features, retain_graph=True, allow_unused=True)
        squares += [loss.new_zeros(()) if g is None else g.float().square().sum() for g in gradients]
    # each rank's loss is the joint batch's, so a feature's gradient is counted once a rank
    norms = (total(torch.stack(squares)).sqrt() / world_size()).tolist()
    keys = [f"{loss}/{name}" for loss in output.losses for name in names]
    return dict(zip(keys, norms, strict=True))
