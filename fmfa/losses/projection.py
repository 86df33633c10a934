"""Cross-modal projection matching as IVT's released code computes it, over all text levels at once."""

import torch
from torch import Tensor


def cmpm_joint(image: Tensor, text: Tensor, identity: Tensor, *, epsilon: float = 1e-8) -> Tensor:
    """Cross-modal projection matching over every image and text of a batch, both directions added.

    Each direction projects one modality's raw embeddings onto the other's unit vectors and compares
    the row softmax p of these projections with a target q by sum_j p_ij (log p_ij - log(q_ij + eps)).
    The target divides the same-identity indicator by its row's *L2* norm, as IVT's released code does
    (Shu et al. 2022; CMPM of Zhang and Lu 2018 divides by the sum). With n positives in every row the
    loss is therefore bounded below by -2 log sqrt(n) = -log n, and negative values are normal.
    There is no temperature: the embeddings' own length plays that part.

    Args:
        image: [M, D] float, not normalised. With multi-level alignment M = 3B: word, phrase and
            sentence rows one after the other.
        text: [M, D] float, not normalised, row i paired with image row i.
        identity: [M] integer.
        epsilon: keeps the logarithm of a non-matching entry finite.

    Returns:
        A scalar. Half-precision embeddings are compared in float32.
    """
    if image.dtype in (torch.float16, torch.bfloat16):
        image, text = image.float(), text.float()
    matches = (identity[:, None] == identity[None, :]).to(image.dtype)
    log_target = (matches / matches.norm(dim=1, keepdim=True) + epsilon).log()
    with torch.autocast(image.device.type, enabled=False):
        return _direction(image, text, log_target) + _direction(text, image, log_target)


def _direction(projected: Tensor, onto: Tensor, log_target: Tensor) -> Tensor:
    log_p = (projected @ (onto / onto.norm(dim=1, keepdim=True)).T).log_softmax(dim=1)
    return (log_p.exp() * (log_p - log_target)).sum(dim=1).mean()
