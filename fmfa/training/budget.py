"""What training a model costs in arithmetic: trained parameters, and floating-point operations a pair."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def training_flops(model: nn.Module, batch: Mapping[str, Tensor]) -> int:
    """Floating-point operations a pair of one forward and backward pass on a batch.

    Matrix products and convolutions are counted, a multiplication and an addition as two. For every model whose forward
    takes a batch. Gradients are cleared; the default generators are left as they were, the model's own are not.
    """
    # The plain attention consists of matrix products, which the counter knows on every device.
    with torch.random.fork_rng(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        sum(model(batch).losses.values()).backward()
    model.zero_grad(set_to_none=True)
    return round(counter.get_total_flops() / len(batch["images"]))


def training_budget(model: nn.Module, batch: Mapping[str, Tensor], kept: str = "") -> dict[str, int]:
    """What training a model costs.

    Args:
        model: any model of the interface, in training mode.
        batch: what operations are counted on.
        kept: beginning of the names of the parameters that retrieval needs; empty is all.

    Returns:
        `parameters` (that are trained), `retrieval_parameters` (of these, kept after training) and
        `training_flops_a_pair`.
    """
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    return {
        "parameters": sum(sizes.values()),
        "retrieval_parameters": sum(size for name, size in sizes.items() if name.startswith(kept)),
        "training_flops_a_pair": training_flops(model, batch),
    }
