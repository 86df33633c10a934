"""open_clip's transformer blocks, computed with fewer passes over memory: the same function up to rounding."""

import torch
from open_clip.transformer import QuickGELU, ResidualAttentionBlock, Transformer
from torch import Tensor, nn
from torch.nn import functional as F

QUICK = 1.702  # x * sigmoid(1.702 x) = silu(1.702 x) / 1.702


def run_blocks(
    transformer: Transformer,
    x: Tensor,
    *,
    causal: bool = False,
    valid: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """The output of all blocks.

    Args:
        transformer: with plain residual attention blocks; others run as open_clip has them.
        x: [B, L, D].
        causal: no position attends to later ones.
        valid: [B, L] bool, positions that are attended to; None for all.
        positions: int64 [B, K], where the output is wanted: the last block then computes nothing else.

    Returns:
        [B, L, D], or [B, K, D] with `positions`.
    """
    if not all(type(block) is ResidualAttentionBlock for block in transformer.resblocks):
        heads = transformer.resblocks[0].get_submodule("attn").num_heads
        x = transformer(x, attn_mask=_additive(x, causal, valid, heads))
        return x if positions is None else pick(x, positions)
    *first, last = transformer.resblocks
    for block in first:
        x = _block(block, x, causal, valid, None)
    return _block(last, x, causal, valid, positions)


def attend(
    attention: nn.MultiheadAttention,
    x: Tensor,
    memory: Tensor | None = None,
    *,
    causal: bool = False,
    valid: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """Multi-head attention without dropout.

    Args:
        attention: of one width for queries, keys and values.
        x: [B, L, D], the queries, and keys and values too without a memory.
        memory: [B, M, D].
        causal: as in `run_blocks`; not with a memory.
        valid: [B, L or M] bool, keys that are attended to; None for all.
        positions: int64 [B, K], the only queries.

    Returns:
        [B, L, D], or [B, K, D] with `positions`.
    """
    weight, bias, heads = attention.in_proj_weight, attention.in_proj_bias, attention.num_heads
    if memory is None and positions is None:
        query, key, value = F.linear(x, weight, bias).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    else:
        width = x.shape[-1]
        queries, keys = x if positions is None else pick(x, positions), x if memory is None else memory
        query = F.linear(queries, weight[:width], bias[:width]).unflatten(-1, (heads, -1)).transpose(1, 2)
        key, value = F.linear(keys, weight[width:], bias[width:]).unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4)
    mask = None if valid is None else valid[:, None, None]
    if causal and positions is not None:
        seen = torch.arange(x.shape[1], device=x.device) <= positions[:, None, :, None]  # [B, 1, K, L]
        mask, causal = seen if mask is None else seen & mask, False
    elif causal and mask is not None:
        places = torch.arange(x.shape[1], device=x.device)
        mask, causal = mask & (places <= places[:, None]), False
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
    return attention.out_proj(out.transpose(1, 2).flatten(2))


def pick(x: Tensor, positions: Tensor) -> Tensor:
    """[B, L, D] at int64 [B, K]: [B, K, D]."""
    return x.gather(1, positions[:, :, None].expand(-1, -1, x.shape[-1]))


def _block(
    block: ResidualAttentionBlock, x: Tensor, causal: bool, valid: Tensor | None, positions: Tensor | None
) -> Tensor:
    attended = attend(block.attn, block.ln_1(x), causal=causal, valid=valid, positions=positions)
    x = (x if positions is None else pick(x, positions)) + block.ls_1(attended)
    return x + block.ls_2(_mlp(block.mlp, block.ln_2(x)))


def _mlp(mlp: nn.Sequential, x: Tensor) -> Tensor:
    first, activation, second = mlp
    if not isinstance(activation, QuickGELU):
        return mlp(x)
    assert isinstance(first, nn.Linear)
    assert isinstance(second, nn.Linear)
    hidden = F.silu(F.linear(x, QUICK * first.weight, QUICK * first.bias))
    return F.linear(hidden, second.weight / QUICK, second.bias)


def _additive(x: Tensor, causal: bool, valid: Tensor | None, heads: int) -> Tensor | None:
    """The mask as open_clip's blocks take it: [L, L] or, by sample and head, [B * heads, L, L]."""
    if not causal and valid is None:
        return None
    length = x.shape[1]
    hidden = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1 if causal else length)
    if valid is not None:
        hidden = (~valid[:, None] | hidden).repeat_interleave(heads, dim=0)
    return torch.zeros(hidden.shape, dtype=x.dtype, device=x.device).masked_fill(hidden, float("-inf"))
