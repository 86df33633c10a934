"""Which caption tokens are hidden from, and asked of, implicit relation reasoning."""

import torch
from torch import Tensor

from fmfa.text.tokens import Tokenizer

KEPT, RANDOM = 0.1, 0.1  # shares of the chosen tokens; the rest become the mask token


def mask_tokens(
    ids: Tensor, tokenizer: Tokenizer, generator: torch.Generator, probability: float = 0.15
) -> tuple[Tensor, Tensor]:
    """Mask caption tokens for implicit relation reasoning (IRRA, Jiang and Ye 2023; FMFA).

    Each ordinary token is chosen with `probability`. Of the chosen ones 80 % become the mask, 10 % a
    random ordinary token, 10 % stay. Where none was chosen, position 1 is, unless it holds no ordinary
    token (the end of an empty caption). Start, end and padding are never chosen, nor is the token with
    id 0 (CLIP's "!"), which the labels could not tell from "not masked".

    Args:
        ids: int64 [..., L], rows of a byte-pair tokenizer; not changed.
        tokenizer: whose ids they are; ordinary ids are [1, mask_id).
        generator: the only source of the draws.
        probability: share of ordinary tokens chosen.

    Returns:
        The masked ids, and the labels: the original id where a token was chosen, else 0. Both as `ids`.
    """
    ordinary = (ids > 0) & (ids < tokenizer.mask_id)
    chosen = ordinary & (torch.rand(ids.shape, generator=generator) < probability)
    chosen[..., 1] |= ordinary[..., 1] & ~chosen.any(-1)
    fate = torch.rand(ids.shape, generator=generator)
    random = torch.randint(1, tokenizer.mask_id, ids.shape, generator=generator)
    replacement = torch.where(fate < RANDOM, random, tokenizer.mask_id)
    replaced = chosen & (fate < 1 - KEPT)
    return torch.where(replaced, replacement, ids), torch.where(chosen, ids, 0)
