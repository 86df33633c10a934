"""Explicit fine-grained alignment (EFA; Yin et al., TOMM 2026), without the [B, B, N, L] tensor.

Text tokens are grouped with the patches of their own image into "joint embeddings"; every text and every
image of the batch is then compared with every joint embedding, position by position.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fmfa.errors import ConfigError

COSTS = ("paper", "released", "literal")
KEEPS = (">=", ">")
CHUNK_ELEMENTS = {"cpu": 2**19, "cuda": 2**26}  # cosines held at a time when no chunk size is given


def sparsify(similarity: Tensor, *, sigma: float = 0.0, keep: str = ">=") -> Tensor:
    """Turn each token's scores over the patches into sparse weights that sum to 1.

    Each row is min-max normalised, entries below the threshold become 0, and the row is divided by its
    sum. A row whose entries are all equal prefers no patch and gets 1/N everywhere.

    Args:
        similarity: [..., N], token-patch scores.
        sigma: threshold after min-max, in [0, 1); 0 means the method's 1/N.
        keep: ">=" keeps entries equal to the threshold (paper), ">" drops them (released code).

    Returns:
        [..., N], with gradient.

    Raises:
        ConfigError: `sigma` or `keep` outside their range.
    """
    if not 0 <= sigma < 1:
        raise ConfigError(f"efa_sigma is {sigma}, expected 0 (for 1/N) or a threshold below 1")
    if keep not in KEEPS:
        raise ConfigError(f"efa_keep is {keep!r}, expected one of {' '.join(KEEPS)}")
    threshold = sigma or 1 / similarity.shape[-1]
    low = similarity.amin(dim=-1, keepdim=True)
    span = similarity.amax(dim=-1, keepdim=True) - low
    flat = span == 0
    # the inner `where` keeps 0/0, and with it NaN gradients, out of the graph
    weight = torch.where(flat, 1.0, (similarity - low) / torch.where(flat, 1.0, span))
    kept = (weight >= threshold) if keep == ">=" else (weight > threshold)
    weight = torch.where(kept | flat, weight, 0.0)
    return weight / weight.sum(dim=-1, keepdim=True)


def group_patches(
    text_tokens: Tensor, patch_tokens: Tensor, *, sigma: float = 0.0, keep: str = ">=", given: Tensor | None = None
) -> Tensor:
    """Language-grouped vision embeddings: for every text token, the patches that it resembles.

    Args:
        text_tokens: [B, L, D], not normalised.
        patch_tokens: [B, N, D] of the paired images, class token left out, not normalised.
        sigma: see `sparsify`.
        keep: see `sparsify`.
        given: [B, L, N], weights that take the place of a token's own, such as its part's true patches
            (`fmfa.losses.grounding.phrase_targets`); rows of zeros leave the token its own.

    Returns:
        Joint embeddings [B, L, D].
    """
    similarity = text_tokens @ patch_tokens.transpose(1, 2)
    weight = sparsify(similarity, sigma=sigma, keep=keep)
    if given is not None:
        weight = torch.where(given.any(dim=-1, keepdim=True), given.to(weight.dtype), weight)
    return weight @ patch_tokens


def pooled_similarity(
    tokens: Tensor,
    joint: Tensor,
    *,
    token_mask: Tensor | None = None,
    joint_mask: Tensor | None = None,
    sharpness: float = 1.0,
    chunk: int = 0,
) -> Tensor:
    """Similarity of every item's tokens with every pair's joint embeddings ("hard coding").

    S_ij = (1/sharpness) log sum_n exp(sharpness * max_l cosine(tokens_in, joint_jl)). Some pairs j are compared at a
    time; only the best l of each (i, n, j) is kept for the backward pass, so that memory does not grow with
    B * B * N * L. On a CPU pairs are taken by their length and padding is left out; elsewhere shapes do not depend on
    the values of the masks.

    Args:
        tokens: [B, N, D], text tokens or patch tokens.
        joint: [B, L, D].
        token_mask: [B, N] bool, positions that count; None counts all. At least one of each row.
        joint_mask: [B, L] bool, likewise.
        sharpness: lambda of the log-sum-exp pooling.
        chunk: pairs at a time; 0 picks a number that keeps a chunk near `CHUNK_ELEMENTS` cosines.

    Returns:
        [B, B].
    """
    tokens, joint = F.normalize(tokens, dim=-1), F.normalize(joint, dim=-1)
    if torch.is_autocast_enabled(tokens.device.type):
        tokens, joint = (t.to(torch.get_autocast_dtype(tokens.device.type)) for t in (tokens, joint))
    pairs, length = joint.shape[:2]
    lengths, order, rows = [length] * pairs, None, tokens.flatten(0, 1)
    if joint_mask is not None:
        # a position that does not count repeats the pair's first that does, which changes no maximum
        first = joint_mask.int().argmax(dim=1)
        counted = torch.where(joint_mask, torch.arange(length, device=joint.device), first[:, None])
        if joint.device.type == "cpu":
            ends = (counted.amax(dim=1) + 1).sort()
            lengths, order = ends.values.tolist(), ends.indices
            joint, counted = joint[order], counted[order]
        joint = joint.gather(1, counted[:, :, None].expand_as(joint))
    if token_mask is not None and tokens.device.type == "cpu":
        rows = tokens[token_mask]
    chunk = chunk or max(1, CHUNK_ELEMENTS.get(rows.device.type, 2**19) // (len(rows) * length))
    best = _BestMatch.apply(rows, joint, lengths, chunk) * sharpness  # [T, B]
    if best.dtype in (torch.float16, torch.bfloat16):
        best = best.float()
    if token_mask is not None and len(rows) < token_mask.numel():
        best = best.new_full((*tokens.shape[:2], pairs), float("-inf")).masked_scatter(token_mask[:, :, None], best)
    else:
        best = best.unflatten(0, tokens.shape[:2])
        if token_mask is not None:
            best = best.masked_fill(~token_mask[:, :, None], float("-inf"))
    similarity = best.logsumexp(dim=1) / sharpness
    return similarity if order is None else similarity[:, order.argsort()]


class _BestMatch(torch.autograd.Function):
    """Largest product of each row [T, D] with the first `lengths[j]` vectors of each of joint [B, L, D]: [T, B]."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, joint: Tensor, lengths: list[int], chunk: int) -> Tensor:
        ctx.blocks = [slice(start, start + chunk) for start in range(0, len(joint), chunk)]
        ctx.lengths = [max(lengths[block]) for block in ctx.blocks]
        found = [
            (rows @ joint[block, :length].flatten(0, 1).T).unflatten(1, (-1, length)).max(dim=2)
            for block, length in zip(ctx.blocks, ctx.lengths, strict=True)
        ]
        ctx.save_for_backward(rows, joint, torch.cat([part.indices for part in found], dim=1).int())
        return torch.cat([part.values for part in found], dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows, joint, place = ctx.saved_tensors
        length = joint.shape[1]
        places = place + length * torch.arange(len(joint), device=place.device, dtype=place.dtype)
        to_rows = F.embedding_bag(places, joint.flatten(0, 1), per_sample_weights=gradient, mode="sum")
        to_joint = torch.zeros_like(joint)
        for block, length in zip(ctx.blocks, ctx.lengths, strict=True):
            chosen = gradient[:, block, None]
            spread = chosen.new_zeros(*chosen.shape[:2], length)
            spread = spread.scatter_(2, place[:, block, None].long(), chosen).flatten(1)  # [T, c * length]
            to_joint[block, :length] = (spread.T @ rows).unflatten(0, (-1, length))
        return to_rows, to_joint, None, None


def ranking_cost(similarity: Tensor, identity: Tensor, *, margin: float, cost: str = "paper") -> Tensor:
    """Ranking cost over a batch's similarities, both directions added, at temperature 1.

    `paper` (a reading of its Eq. 11): the mean over anchors i of log sum over columns j of another
    identity of exp(S_ij - S_ii + margin), and the same over columns; an anchor without negatives adds 0.
    `literal`: Eq. 11 as printed, 1 / B times the log of one sum over all anchors and their negatives, about B times
    weaker.
    `released`: rows of S are scaled to unit length; u_ij = S_ij - S_ii + margin and
    v_ij = S_ij - S_jj + margin, both 0 on the diagonal; mean_j log sum_i exp(u_ij), and the same of v.

    Args:
        similarity: [B, B]; the diagonal holds the pairs.
        identity: [B] integer; unused by `released`.
        margin: added to every gap.
        cost: one of `COSTS`.

    Returns:
        A scalar.

    Raises:
        ConfigError: unknown `cost`.
    """
    if cost in ("paper", "literal"):
        negative = identity[:, None] != identity[None, :]
        by_row = similarity - similarity.diagonal()[:, None] + margin
        by_column = (similarity - similarity.diagonal()[None, :] + margin).T
        if cost == "literal":
            by_row, by_column, negative = by_row.reshape(1, -1), by_column.reshape(1, -1), negative.reshape(1, -1)
        return (_log_sum(by_row, negative) + _log_sum(by_column, negative)).sum() / len(similarity)
    if cost == "released":
        similarity = F.normalize(similarity, dim=1)
        pair = torch.eye(len(similarity), dtype=torch.bool, device=similarity.device)
        diagonal = similarity.diagonal()
        by_row, by_column = (
            (similarity - own + margin).masked_fill(pair, 0.0).logsumexp(dim=0).mean()
            for own in (diagonal[:, None], diagonal[None, :])
        )
        return by_row + by_column
    raise ConfigError(f"efa_cost is {cost!r}, expected one of {', '.join(COSTS)}")


def efa(
    text_tokens: Tensor,
    patch_tokens: Tensor,
    joint: Tensor,
    identity: Tensor,
    *,
    text_mask: Tensor | None = None,
    margin_text: float = 0.1,
    margin_image: float = 0.1,
    cost: str = "paper",
    sharpness: float = 1.0,
    chunk: int = 0,
) -> tuple[Tensor, Tensor]:
    """EFA's two terms; the loss is their sum.

    Args:
        text_tokens: [B, L, D], not normalised.
        patch_tokens: [B, N, D], class token left out, not normalised.
        joint: [B, L, D] of `group_patches`.
        identity: [B] integer.
        text_mask: [B, L] bool, text positions that count; None counts all, padding included.
        margin_text: margin of the text-to-joint term.
        margin_image: margin of the vision-to-joint term.
        cost: see `ranking_cost`.
        sharpness: see `pooled_similarity`.
        chunk: see `pooled_similarity`.

    Returns:
        The text-to-joint and the vision-to-joint cost, scalars.
    """
    pool: dict[str, Any] = {"joint_mask": text_mask, "sharpness": sharpness, "chunk": chunk}
    by_text = pooled_similarity(text_tokens, joint, token_mask=text_mask, **pool)
    by_image = pooled_similarity(patch_tokens, joint, **pool)
    return (
        ranking_cost(by_text, identity, margin=margin_text, cost=cost),
        ranking_cost(by_image, identity, margin=margin_image, cost=cost),
    )


def _log_sum(gap: Tensor, negative: Tensor) -> Tensor:
    """Row-wise log-sum-exp over the negatives: [B, B] to [B], 0 for a row without any."""
    has_negative = negative.any(dim=1)
    return torch.where(has_negative, gap.masked_fill(~negative, float("-inf")).logsumexp(dim=1), 0.0)
