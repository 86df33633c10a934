"""Training heads on top of CLIP: IRRA's masked-token prediction with the image's help, ID classifier."""

from collections import OrderedDict

import torch
from open_clip.transformer import LayerNorm, QuickGELU, Transformer
from torch import Tensor, nn


def head_count(width: int, heads: int | None = None) -> int:
    """Attention heads of a head of `width`: the number given, or one for each 64 channels, at least 1."""
    return heads or max(1, width // 64)


class CrossModalHead(nn.Module):
    """Implicit relation reasoning (IRR; Jiang and Ye, CVPR 2023): predict masked tokens using the image.

    The masked caption's tokens query all image tokens through one cross attention without residual;
    `depth` CLIP-style self-attention blocks and a vocabulary head follow. Module names are those of IRRA.
    """

    def __init__(self, width: int, vocab_size: int, *, depth: int = 4, heads: int | None = None) -> None:
        """Random weights with IRRA's standard deviations; `width` is the joint width D."""
        super().__init__()
        self.heads = head_count(width, heads)
        self.cross_attn = nn.MultiheadAttention(width, self.heads, batch_first=True)
        self.cross_modal_transformer = Transformer(width, depth, self.heads, act_layer=QuickGELU)
        self.ln_pre_t = LayerNorm(width)
        self.ln_pre_i = LayerNorm(width)
        self.ln_post = LayerNorm(width)
        self.mlm_head = nn.Sequential(
            OrderedDict(
                dense=nn.Linear(width, width),
                gelu=QuickGELU(),
                ln=LayerNorm(width),
                fc=nn.Linear(width, vocab_size),
            )
        )
        self._initialise(width, depth)

    def _initialise(self, width: int, depth: int) -> None:
        attention, output, hidden = width**-0.5, width**-0.5 * (2 * depth) ** -0.5, (2 * width) ** -0.5
        for block in self.cross_modal_transformer.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=attention)
            nn.init.normal_(block.attn.out_proj.weight, std=output)
            nn.init.normal_(block.mlp.c_fc.weight, std=hidden)
            nn.init.normal_(block.mlp.c_proj.weight, std=output)
        nn.init.normal_(self.cross_attn.in_proj_weight, std=attention)
        nn.init.normal_(self.cross_attn.out_proj.weight, std=output)
        nn.init.normal_(self.mlm_head.dense.weight, std=hidden)
        nn.init.normal_(self.mlm_head.fc.weight, std=output)

    def forward(self, text_tokens: Tensor, image_tokens: Tensor, chosen: Tensor, valid: Tensor | None = None) -> Tensor:
        """Vocabulary logits of the chosen positions.

        Args:
            text_tokens: [B, L, D] of the masked caption, all context positions.
            image_tokens: [B, 1+N, D], class token included.
            chosen: [B, L] bool, the M positions to predict; the vocabulary head runs on them only.
            valid: [B, L] bool, text positions that self-attention may look at; None lets padding take
                part, as IRRA does.

        Returns:
            [M, V], in row-major order of `chosen`.
        """
        memory = self.ln_pre_i(image_tokens)
        x = self.cross_attn(self.ln_pre_t(text_tokens), memory, memory, need_weights=False)[0]
        x = self.cross_modal_transformer(x, attn_mask=None if valid is None else self._padding_mask(valid, x))
        return self.mlm_head(self.ln_post(x)[chosen])

    def _padding_mask(self, valid: Tensor, like: Tensor) -> Tensor:
        """Additive mask [B * heads, L, L] that hides invalid positions from every query."""
        mask = torch.zeros(valid.shape, dtype=like.dtype, device=valid.device)
        mask = mask.masked_fill(~valid, float("-inf"))
        return mask[:, None, :].expand(-1, valid.shape[1], -1).repeat_interleave(self.heads, dim=0)


def identity_classifier(width: int, identities: int) -> nn.Linear:
    """Linear classifier from embeddings to identities: weights of standard deviation 0.001, bias 0."""
    classifier = nn.Linear(width, identities)
    nn.init.normal_(classifier.weight, std=0.001)
    nn.init.zeros_(classifier.bias)
    return classifier
