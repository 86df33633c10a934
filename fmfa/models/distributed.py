"""Collectives that keep gradients, so that a loss over several processes equals one over the joint batch.

Every rank computes the same loss of the joint batch. The backward pass of `gather` sums the gradients of
all ranks, and DDP then averages parameter gradients over ranks, so the two factors of the world size
cancel and each parameter gets the gradient that one process would have computed.
"""

from typing import Any

import torch
from torch import Tensor, distributed


def world_size() -> int:
    """Number of processes that train together; 1 when torch.distributed is not initialised."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def gather(tensor: Tensor) -> Tensor:
    """Concatenate the first dimension over all ranks, in rank order, with gradients.

    Args:
        tensor: [B, ...]; B may differ between ranks, the other dimensions may not.

    Returns:
        [sum of B, ...], equal on every rank; `tensor` itself in a single process.
    """
    if world_size() == 1:
        return tensor
    sizes = [int(size) for size in _all_gather(torch.tensor([len(tensor)], device=tensor.device))]
    return _Gather.apply(tensor, sizes)


def total(value: Tensor) -> Tensor:
    """Sum of a tensor over all ranks, detached; the tensor itself (detached) in a single process."""
    value = value.detach()
    if world_size() > 1:
        value = value.clone()
        distributed.all_reduce(value)
    return value


def largest(value: Tensor) -> Tensor:
    """Largest value of a tensor over all ranks, element by element, detached."""
    value = value.detach()
    if world_size() > 1:
        value = value.clone()
        distributed.all_reduce(value, op=distributed.ReduceOp.MAX)
    return value


def _all_gather(tensor: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    distributed.all_gather(parts, tensor.contiguous())
    return parts


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])  # ranks exchange equal shapes only
        padded[: len(tensor)] = tensor
        return torch.cat([part[:size] for part, size in zip(_all_gather(padded), sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous().clone()
        distributed.all_reduce(gradient)
        return gradient.split(ctx.sizes)[distributed.get_rank()], None
