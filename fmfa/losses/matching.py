"""Batch losses of text-to-image person retrieval, as pure functions of embeddings.

Embeddings are [B, D] and need not be normalised; row i of `image` and row i of `text` are a pair.
Rows with the same `identity` are positives of each other. Half-precision inputs are compared in float32.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fmfa.errors import ConfigError

ASDM_FORMS = ("paper", "released")
IGNORED = -100  # a label that adds nothing to `masked_token_loss`


def cosine_similarity(text: Tensor, image: Tensor) -> Tensor:
    """Cosine of every text with every image: [B, D] and [B, D] give [B, B], rows are texts."""
    with torch.autocast(text.device.type, enabled=False):
        return F.normalize(_full(text), dim=1) @ F.normalize(_full(image), dim=1).T


@torch.no_grad()
def pair_similarities(text: Tensor, image: Tensor, identity: Tensor) -> dict[str, Tensor]:
    """Mean cosine of the texts [B, D] with images [B, D] of their own identity ("cosine_matched") and of others."""
    cosine, same = cosine_similarity(text, image), identity[:, None] == identity[None, :]
    kinds = {"cosine_matched": same, "cosine_unmatched": ~same}
    return {name: (cosine * pairs).sum() / pairs.sum().clamp(min=1) for name, pairs in kinds.items()}


def itc(image: Tensor, text: Tensor, *, scale: float = 50.0) -> Tensor:
    """Image-text contrastive loss (InfoNCE): each row's only target is its own pair.

    The mean of the two directions' cross entropies over `scale` times the cosine (Radford et al. 2021).
    Same-identity rows count as negatives here.

    Returns:
        A scalar.
    """
    logits = scale * cosine_similarity(text, image)
    pairs = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2


def sdm(image: Tensor, text: Tensor, identity: Tensor, *, scale: float = 50.0, epsilon: float = 1e-8) -> Tensor:
    """Similarity distribution matching (Jiang and Ye, CVPR 2023, eq. 4 to 6).

    Per row: sum_j p_ij (log p_ij - log(q_ij + epsilon)) with p the softmax of `scale` * cosine and q
    uniform over the row's positives. The mean over rows, text-to-image and image-to-text added.

    Returns:
        A scalar.
    """
    similarity = cosine_similarity(text, image)
    return (
        _divergence(similarity, identity, scale, epsilon).mean()
        + _divergence(similarity.T, identity, scale, epsilon).mean()
    )


def asdm(
    image: Tensor,
    text: Tensor,
    identity: Tensor,
    *,
    scale: float = 50.0,
    alpha: float = 10.0,
    form: str = "paper",
    offset: float = 1.0,
    gradient: bool = True,
    epsilon: float = 1e-8,
) -> Tensor:
    """Adaptive similarity distribution matching (Yin et al., TOMM 2026, Eq. 2 and 3): SDM with a weight on each row.

    The weights are those of `asdm_weights`. The paper does not say whether they are constants; in the released code
    the gradient flows through them.

    Args:
        image: [B, D].
        text: [B, D].
        identity: [B] integer.
        scale: see `asdm_weights`, as alpha, form and offset.
        alpha: strength of the weighting.
        form: "paper" or "released".
        offset: weight of a row without a gap.
        gradient: whether the gradient flows through the weights.
        epsilon: added to the targets, as in `sdm`.

    Returns:
        A scalar.

    Raises:
        ConfigError: unknown `form`.
    """
    similarity = cosine_similarity(text, image)
    form_of_weights: dict[str, Any] = {"scale": scale, "alpha": alpha, "form": form, "offset": offset}
    total = similarity.new_zeros(())
    for rows in (similarity, similarity.T):
        weights = asdm_weights(rows if gradient else rows.detach(), identity, **form_of_weights)
        total = total + (weights * _divergence(rows, identity, scale, epsilon)).mean()
    return total


def asdm_weights(
    similarity: Tensor,
    identity: Tensor,
    *,
    scale: float = 50.0,
    alpha: float = 10.0,
    form: str = "paper",
    offset: float = 1.0,
) -> Tensor:
    """Weight of each row of A-SDM, at least `offset` (1) and larger the worse the row's own pair is ranked.

    `paper`: 1 + alpha * (max_k p_ik - p_ii), p the softmax of `scale` * similarity. With several positives
    in the batch they share p's mass, so a row that ranks all its positives first still gets more than 1
    unless its own pair is the best of them.
    `released`: 1 where the best column is the first column of the row's identity, else 1 + alpha times
    the cosine gap between these two columns (alpha 0.1 in the released code, so at most 1.2).

    Args:
        similarity: [B, B] cosines; the diagonal holds the pairs.
        identity: [B] integer.
        scale: 1 / temperature of the softmax.
        alpha: strength of the weighting; 0 gives plain SDM.
        form: "paper" or "released".
        offset: weight of a row without a gap.

    Returns:
        [B], with gradient.

    Raises:
        ConfigError: unknown `form`.
    """
    if form == "paper":
        p = (scale * similarity).softmax(dim=1)
        return offset + alpha * (p.max(dim=1).values - p.diagonal())
    if form == "released":
        best = similarity.max(dim=1).values
        # argmax of the 0/1 positives is the first of them
        first = (identity[:, None] == identity[None, :]).int().argmax(dim=1, keepdim=True)
        return offset + alpha * (best - similarity.gather(1, first).squeeze(1))
    raise ConfigError(f"asdm_form is {form!r}, expected one of {', '.join(ASDM_FORMS)}")


def identity_loss(image_logits: Tensor, text_logits: Tensor, label: Tensor) -> Tensor:
    """Mean of the two modalities' cross entropies over identities.

    Args:
        image_logits: [B, K], of the classifier that both modalities share.
        text_logits: [B, K].
        label: [B] int64 in 0..K-1.

    Returns:
        A scalar.
    """
    return (F.cross_entropy(_full(image_logits), label) + F.cross_entropy(_full(text_logits), label)) / 2


def masked_token_loss(logits: Tensor, label: Tensor) -> Tensor:
    """Sum (not mean) of the cross entropies of masked positions, so that processes can share one mean.

    Args:
        logits: [M, V]; M may be 0, which gives 0 with a zero gradient.
        label: [M] int64 token ids; `IGNORED` adds nothing.

    Returns:
        A scalar.
    """
    return F.cross_entropy(_full(logits), label, reduction="sum", ignore_index=IGNORED)


def _full(tensor: Tensor) -> Tensor:
    """Half precision to float32; float32 and float64 stay."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _divergence(similarity: Tensor, identity: Tensor, scale: float, epsilon: float) -> Tensor:
    """SDM's sum of each row: [B, B] cosines to [B]."""
    log_p = (scale * similarity).log_softmax(dim=1)
    positives = (identity[:, None] == identity[None, :]).to(similarity.dtype)
    log_q = (positives / positives.sum(dim=1, keepdim=True) + epsilon).log()
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


def cmpm(image: Tensor, text: Tensor, identity: Tensor, *, epsilon: float = 1e-8) -> Tensor:
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
