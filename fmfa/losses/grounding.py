"""Token-to-patch supervision by true part maps: an oracle, for data that know where each phrase's part is.

It says what better alignment could be worth; it is no method of either paper.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def phrase_targets(
    part_maps: Tensor, token_parts: Tensor, *, patch: tuple[int, int], stride: tuple[int, int]
) -> Tensor:
    """Where each phrase token should look: the patches of its part, by the share that the part covers of each.

    Args:
        part_maps: integer [B, H, W], the part that each pixel shows, -1 for none.
        token_parts: integer [B, L], the part that each token's phrase speaks of, -1 for none.
        patch: height and width of a patch in pixels.
        stride: pixels between patches, down and across; patches are counted row by row.

    Returns:
        float32 [B, L, N]. Rows sum to 1, but are 0 everywhere for a token of no phrase, and for one whose part is on
        no patch of its picture.
    """
    parts = torch.arange(max(int(token_parts.max()), 0) + 1, device=part_maps.device)
    pixels = (part_maps[:, None] == parts[:, None, None]).float()  # [B, P, H, W]
    share = F.avg_pool2d(pixels, patch, stride).flatten(2)  # [B, P, N]
    spoken = token_parts.clamp(min=0).long()[:, :, None].expand(-1, -1, share.shape[2])
    own = share.gather(1, spoken).masked_fill(token_parts[:, :, None] < 0, 0.0)
    total = own.sum(dim=2, keepdim=True)
    return own / torch.where(total > 0, total, 1.0)


def token_patch_cosine(text_tokens: Tensor, patch_tokens: Tensor) -> Tensor:
    """Cosine of every token with every patch of its own picture: [B, L, D] and [B, N, D] give [B, L, N].

    Half-precision inputs are compared in float32.
    """
    with torch.autocast(text_tokens.device.type, enabled=False):
        text, patches = (
            F.normalize(t.float() if t.dtype in (torch.float16, torch.bfloat16) else t, dim=-1)
            for t in (text_tokens, patch_tokens)
        )
        return text @ patches.transpose(1, 2)


def grounding_loss(cosine: Tensor, target: Tensor, *, temperature: float) -> Tensor:
    """Sum (not mean) of the cross entropies of phrase tokens, so that processes can share one mean.

    For a token l with a visible part: - sum_n target_ln log p_ln, p_l the softmax over the patches of
    cosine_l / temperature. Tokens without a target add nothing.

    Args:
        cosine: [B, L, N] of `token_patch_cosine`.
        target: [B, L, N] of `phrase_targets`.
        temperature: of the softmax, above 0.

    Returns:
        A scalar.
    """
    return -(target.to(cosine.dtype) * (cosine / temperature).log_softmax(dim=2)).sum()


def grounding_hits(cosine: Tensor, target: Tensor) -> Tensor:
    """Which phrase tokens pass the pointing game, bool [M], in row-major order of the M tokens with a target.

    A hit: the token's highest patch holds at least half as much of its part as the part's best patch.
    """
    spoken = target.any(dim=2)
    cosine, target = cosine[spoken], target[spoken]
    found = target.gather(1, cosine.argmax(dim=1, keepdim=True))[:, 0]
    return found >= target.amax(dim=1) / 2
