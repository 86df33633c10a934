"""Maps of a phrase over the patches of its picture: what a system itself takes for the place of the words."""

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from fmfa.alignment.relevance import gradient_relevance
from fmfa.data.images import resolve_image
from fmfa.evaluation.encoding import evaluating
from fmfa.losses.efa import sparsify
from fmfa.systems import System
from fmfa.text.tokens import phrase_tokens

TOKEN_PATCH, SPARSE, ATTENTION, GRADIENT = "token-patch", "token-patch sparse", "cross-attention", "gradient"
MAPS = (TOKEN_PATCH, SPARSE, ATTENTION, GRADIENT)
BATCH_SIZE = 64


def phrase_maps(
    system: System, images: str | Path, phrases: pd.DataFrame, *, batch_size: int = BATCH_SIZE
) -> dict[str, np.ndarray]:
    """Maps of phrases over the patches of their pictures, by kind of map.

    `token-patch`: the dot products of EFA between a caption's tokens and the patches (for IVT, of its shared space),
    mean over the phrase's tokens, its least patch at 0. `token-patch sparse`: the same after EFA's sparsification,
    with the model's own threshold where it was trained with EFA. `cross-attention`: the weights of IRR, mean over
    heads and the phrase's tokens, which are not masked, so that all maps answer for the same words. `gradient`: the
    positive part of `gradient_relevance` between the picture and the phrase read as a text by itself, since a
    caption's embedding would give all its phrases one map.

    Args:
        system: any.
        images: folder that the column `image` starts from.
        phrases: of `draw_phrases`.
        batch_size: phrases at a time.

    Returns:
        float32 [P, N] by name, nothing negative; `cross-attention` only where the model has IRR. A phrase that the
        tokenizer cut off has the same value everywhere in the maps of tokens.
    """
    parts: dict[str, list[np.ndarray]] = {}
    with evaluating(system.model), torch.autocast(_device(system.model).type, enabled=False):
        for start in range(0, len(phrases), batch_size):
            for name, maps in _batch_maps(system, Path(images), phrases.iloc[start : start + batch_size]).items():
                parts.setdefault(name, []).append(maps.float().cpu().numpy())
    return {name: np.concatenate(maps) for name, maps in parts.items()}


def _batch_maps(system: System, images: Path, phrases: pd.DataFrame) -> dict[str, Tensor]:
    model, device = system.model, _device(system.model)
    pictures = torch.stack([system.transform(resolve_image(images, name)) for name in phrases["image"]]).to(device)
    captions = system.tokenizer(phrases["caption"].tolist()).to(device)
    with torch.no_grad():
        seen, read = model.encode_image(pictures).tokens, model.encode_text(captions).tokens
    chosen = _phrase_positions(system, phrases, read.shape[1]).to(device)
    maps = token_maps(model, seen, read, chosen)
    alone = system.tokenizer(phrases["phrase"].tolist()).to(device)
    return maps | {GRADIENT: gradient_relevance(model, pictures, alone).clamp(min=0)}


@torch.no_grad()
def token_maps(model: nn.Module, image_tokens: Tensor, text_tokens: Tensor, chosen: Tensor) -> dict[str, Tensor]:
    """The maps that come from tokens; see `phrase_maps`.

    Args:
        model: whose objectives give EFA's threshold, and whose `irr` the cross attention, where there are any.
        image_tokens: [B, 1+N, D].
        text_tokens: [B, L, D].
        chosen: bool [B, L], the phrase's tokens.

    Returns:
        [B, N] by name.
    """
    wanted = getattr(model, "objectives", None)
    efa = {"sigma": wanted.efa_sigma, "keep": wanted.efa_keep} if wanted and wanted.efa else {}
    similarity = text_tokens @ image_tokens[:, 1:].transpose(1, 2)  # [B, L, N]
    dense = _mean_of(similarity, chosen)
    maps = {
        TOKEN_PATCH: dense - dense.amin(dim=1, keepdim=True),
        SPARSE: _mean_of(sparsify(similarity, **efa), chosen),
    }
    if (head := getattr(model, "irr", None)) is not None:
        memory = head.ln_pre_i(image_tokens)
        weights = head.cross_attn(head.ln_pre_t(text_tokens), memory, memory)[1]  # [B, L, 1+N], mean over heads
        maps[ATTENTION] = _mean_of(weights[:, :, 1:], chosen)
    return maps


def _mean_of(rows: Tensor, chosen: Tensor) -> Tensor:
    """Mean over the chosen rows, [B, L, N] to [B, N]; 0 where none is chosen."""
    weight = chosen.to(rows.dtype) / chosen.sum(dim=1, keepdim=True).clamp(min=1)
    return (weight[:, None] @ rows)[:, 0]


def _phrase_positions(system: System, phrases: pd.DataFrame, length: int) -> Tensor:
    chosen = torch.zeros(len(phrases), length, dtype=torch.bool)
    for row, phrase in zip(chosen, phrases.itertuples()):
        row[phrase_tokens(system.tokenizer, phrase.caption, (phrase.start, phrase.end))] = True
    return chosen


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
