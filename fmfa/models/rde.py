"""RDE (Qin et al., CVPR 2024): a CLIP in IRRA's layout with a second branch over the tokens that it attends to most."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fmfa.errors import CheckpointError
from fmfa.models.clip import ClipRetriever
from fmfa.models.outputs import Encoded, Retriever
from fmfa.models.weight_files import require_numbers

HEADS = {"visul_emb_layer.": "fc", "texual_emb_layer.": "linear"}
"""Names of the two heads in RDE's files, and of the linear layer that each one uses."""
RATIO = 0.3  # of the positions that are selected


class RdeRetriever(Retriever):
    """Both branches of RDE in one embedding, whose cosine is the mean of the branches' cosines.

    The first is CLIP's own. In the second, of the positions that the class token (or the end token) attends to most in
    the last block, averaged over heads, 30 % are taken; each projected token, of unit length, goes through a linear
    layer plus a two-layer perceptron with batch norm, and the maximum over positions is the feature.
    """

    def __init__(self, base: ClipRetriever, state: Mapping[str, Tensor], source: str = "weights") -> None:
        """Take over a model and build the second branch from a file's tensors; CheckpointError if they do not fit."""
        super().__init__()
        self.base, self.config = base, base.config
        self.image, self.text = (_Head(state, prefix, linear, source) for prefix, linear in HEADS.items())

    def encode_image(self, images: Tensor) -> Encoded:
        """Encode images as `ClipRetriever` does; the embedding is [B, D + D'] of the two branches."""
        block = self.base.clip.visual.transformer.resblocks[-1]
        with _read(block) as inputs:
            encoded = self.base.encode_image(images)
        weights = _attention(block, inputs[0], torch.zeros(len(images), dtype=torch.int64, device=images.device))
        patches = encoded.tokens.shape[1] - 1
        chosen = weights[:, 1:].topk(max(1, int(patches * RATIO))).indices + 1  # [B, K]
        return _joined(encoded, self.image, chosen, torch.ones_like(chosen, dtype=torch.bool))

    def encode_text(self, ids: Tensor, attention_mask: Tensor | None = None) -> Encoded:
        """Encode captions as `ClipRetriever` does; the embedding is [B, D + D'] of the two branches."""
        tower = getattr(self.base.clip, "text", self.base.clip)
        block = tower.transformer.resblocks[-1]
        with _read(block) as inputs:
            encoded = self.base.encode_text(ids, positions=int(self.base.longest_caption(ids)))  # in one pass
        ids, end = ids[:, : encoded.tokens.shape[1]], self.base.end_positions(ids)
        at_end = _attention(block, inputs[0], end, causal=True) * (ids != 0)  # [B, L]
        at_end[:, 0] = -1
        at_end.scatter_(1, end[:, None], -1)
        most = min(max(1, int((self.base.clip.context_length - 2) * RATIO)), ids.shape[1])
        words = ((ids != 0).sum(1) - 2).clamp(1, most)
        kept = torch.arange(most, device=ids.device) < words[:, None]  # [B, K], the highest first
        return _joined(encoded, self.text, at_end.topk(most).indices, kept)


class _Head(nn.Module):
    def __init__(self, state: Mapping[str, Tensor], prefix: str, linear: str, source: str) -> None:
        super().__init__()
        names = [f"{linear}.{part}" for part in ("weight", "bias")]
        names += [f"mlp.layers.{n}.{part}" for n in (0, 1) for part in ("weight", "bias")]
        names += [f"mlp.bns.0.{part}" for part in ("weight", "bias", "running_mean", "running_var")]
        for name in (prefix + name for name in names):
            if name not in state:
                raise CheckpointError(f"{source}: {name} is missing, which RDE's second branch needs")
            require_numbers(name, state[name], source)
        self.linear, self.hidden, self.norm, self.out = linears = (
            *(nn.Linear(*state[f"{prefix}{name}.weight"].shape[::-1]) for name in (linear, "mlp.layers.0")),
            nn.BatchNorm1d(len(state[f"{prefix}mlp.bns.0.weight"])),
            nn.Linear(*state[f"{prefix}mlp.layers.1.weight"].shape[::-1]),
        )
        for module, name in zip(linears, (linear, "mlp.layers.0", "mlp.bns.0", "mlp.layers.1"), strict=True):
            own = {key: state[f"{prefix}{name}.{key}"].float() for key in module.state_dict() if "batches" not in key}
            module.load_state_dict(own, strict=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.norm(self.hidden(tokens).flatten(0, 1)).relu().unflatten(0, tokens.shape[:2])
        return self.linear(tokens) + self.out(hidden)


def _joined(encoded: Encoded, head: nn.Module, chosen: Tensor, kept: Tensor) -> Encoded:
    tokens = encoded.tokens.gather(1, chosen[..., None].expand(-1, -1, encoded.tokens.shape[2]))  # [B, K, D]
    features = head(F.normalize(tokens, dim=-1)).masked_fill(~kept[..., None], -torch.inf).amax(1)
    branches = [F.normalize(branch.float(), dim=-1) for branch in (encoded.embedding, features)]
    return Encoded(encoded.tokens, torch.cat(branches, dim=-1))


@contextmanager
def _read(block: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what a block's attention reads, [B, L, width], of every pass in the body."""
    inputs: list[Tensor] = []
    handle = block.get_submodule("ln_1").register_forward_hook(lambda _, __, output: inputs.append(output))
    try:
        yield inputs
    finally:
        handle.remove()


def _attention(block: nn.Module, x: Tensor, at: Tensor, causal: bool = False) -> Tensor:
    """Attention of one position [B] of each sample to all positions, averaged over heads: [B, L]."""
    layer: Any = block.get_submodule("attn")
    query, key, _ = (
        F.linear(x, layer.in_proj_weight, layer.in_proj_bias).unflatten(-1, (3, layer.num_heads, -1)).unbind(2)
    )
    query = query[torch.arange(len(at), device=at.device), at]  # [B, heads, width / heads]
    scores = torch.einsum("bhd,blhd->bhl", query, key) / query.shape[-1] ** 0.5
    if causal:
        later = torch.arange(x.shape[1], device=x.device) > at[:, None]
        scores = scores.masked_fill(later[:, None], -torch.inf)
    return scores.softmax(-1).mean(1)
