"""Maps of a phrase over the patches of its picture: attention, gradients and cosines of patches."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fmfa.data.images import resolve_image
from fmfa.errors import ConfigError
from fmfa.evaluation.evaluate import evaluating
from fmfa.losses.efa import sparsify
from fmfa.models.clip import ClipRetriever
from fmfa.models.ivt import IvtRetriever
from fmfa.models.outputs import Retriever
from fmfa.systems import System
from fmfa.text.bytepair import phrase_tokens

TOKEN_PATCH, SPARSE, ATTENTION, GRADIENT = "token-patch", "token-patch sparse", "cross-attention", "gradient"
MAPS = (TOKEN_PATCH, SPARSE, ATTENTION, GRADIENT)
BATCH_SIZE = 64  # phrases
TRUE_COVERAGE = 0.25  # a patch shows a part that covers this share of its pixels,
TRUE_OF_BEST = 0.5  # or, for a part smaller than that, this share of what its best patch has


def phrase_maps(system: System, images: str | Path, phrases: pd.DataFrame) -> dict[str, np.ndarray]:
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

    Returns:
        float32 [P, N] by name, nothing negative; `cross-attention` only where the model has IRR. A phrase that the
        tokenizer cut off has the same value everywhere in the maps of tokens.
    """
    parts: dict[str, list[np.ndarray]] = {}
    with evaluating(system.model), torch.autocast(_device(system.model).type, enabled=False):
        for start in range(0, len(phrases), BATCH_SIZE):
            for name, maps in _batch_maps(system, Path(images), phrases.iloc[start : start + BATCH_SIZE]).items():
                parts.setdefault(name, []).append(maps.float().cpu().numpy())
    return {name: np.concatenate(maps) for name, maps in parts.items()}


def _batch_maps(system: System, images: Path, phrases: pd.DataFrame) -> dict[str, Tensor]:
    model, device = system.model, _device(system.model)
    pictures = torch.stack([system.transform(resolve_image(images, name)) for name in phrases["image"]]).to(device)
    captions = system.tokenizer(phrases["caption"].tolist()).to(device)
    with torch.no_grad():
        seen, read = model.encode_image(pictures).tokens, model.encode_text(captions).tokens
    phrase_mask = _phrase_positions(system, phrases, read.shape[1]).to(device)
    maps = token_maps(model, seen, read, phrase_mask)
    alone = system.tokenizer(phrases["phrase"].tolist()).to(device)
    return maps | {GRADIENT: gradient_relevance(model, pictures, alone).clamp(min=0)}


@torch.no_grad()
def token_maps(model: Retriever, image_tokens: Tensor, text_tokens: Tensor, phrase_mask: Tensor) -> dict[str, Tensor]:
    """The maps that come from tokens; see `phrase_maps`.

    Args:
        model: whose objectives give EFA's threshold, and whose `irr` the cross attention, if any.
        image_tokens: [B, 1+N, D].
        text_tokens: [B, L, D].
        phrase_mask: bool [B, L], the phrase's tokens.

    Returns:
        [B, N] by name.
    """
    objectives = getattr(model, "objectives", None)
    efa = {"sigma": objectives.efa_sigma, "keep": objectives.efa_keep} if objectives and objectives.efa else {}
    similarity = text_tokens @ image_tokens[:, 1:].transpose(1, 2)  # [B, L, N]
    dense = _mean_of(similarity, phrase_mask)
    maps = {
        TOKEN_PATCH: dense - dense.amin(dim=1, keepdim=True),
        SPARSE: _mean_of(sparsify(similarity, **efa), phrase_mask),
    }
    if (head := getattr(model, "irr", None)) is not None:
        memory = head.ln_pre_i(image_tokens)
        weights = head.cross_attn(head.ln_pre_t(text_tokens), memory, memory)[1]  # [B, L, 1+N], mean over heads
        maps[ATTENTION] = _mean_of(weights[:, :, 1:], phrase_mask)
    return maps


def _mean_of(rows: Tensor, mask: Tensor) -> Tensor:
    """Mean over the chosen rows, [B, L, N] to [B, N]; 0 where none is chosen."""
    weight = mask.to(rows.dtype) / mask.sum(dim=1, keepdim=True).clamp(min=1)
    return (weight[:, None] @ rows)[:, 0]


def _phrase_positions(system: System, phrases: pd.DataFrame, length: int) -> Tensor:
    mask = torch.zeros(len(phrases), length, dtype=torch.bool)
    for row, phrase in zip(mask, phrases.itertuples()):
        row[phrase_tokens(system.tokenizer, phrase.caption, (phrase.start, phrase.end))] = True
    return mask


def _device(model: Retriever) -> torch.device:
    return next(model.parameters()).device


@dataclass(frozen=True)
class PatchGrid:
    """Where the patches of an image encoder lie; sizes in pixels, patches row by row.

    Attributes:
        image_size: height and width of the input.
        patch: height and width of a patch.
        stride: between patches, down and across.
    """

    image_size: tuple[int, int]
    patch: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        rows, columns = (
            (side - patch) // stride + 1 for side, patch, stride in zip(self.image_size, self.patch, self.stride)
        )
        return rows, columns

    def coverage(self, masks: np.ndarray) -> np.ndarray:
        """Share of each patch that a mask covers.

        Args:
            masks: [P, H, W], 0 to 1 (or bool), in the picture's own size; resized as the picture is.

        Returns:
            float32 [P, N].
        """
        pixels = torch.from_numpy(np.asarray(masks, dtype=np.float32))[:, None]
        if tuple(pixels.shape[-2:]) != tuple(self.image_size):
            pixels = F.interpolate(pixels, self.image_size, mode="bilinear", antialias=True, align_corners=False)
        return F.avg_pool2d(pixels, self.patch, self.stride).flatten(1).numpy()


def patch_grid(model: Retriever) -> PatchGrid:
    """The grid of a model; ConfigError for a model without a patch convolution."""
    convolution = patch_convolution(model)
    return PatchGrid(tuple(model.config["image_size"]), convolution.kernel_size, convolution.stride)


def patch_convolution(model: Retriever) -> nn.Conv2d:
    """The convolution that turns pixels into patch tokens; ConfigError for another kind of model."""
    if isinstance(model, ClipRetriever):
        return model.clip.visual.conv1
    if isinstance(model, IvtRetriever):
        return model.encoder_vl.patch_embed.proj
    raise ConfigError(f"{type(model).__name__} has no known patches; expected a ClipRetriever or an IvtRetriever")


def true_patches(coverage: np.ndarray) -> np.ndarray:
    """Which patches show a part, bool [P, N].

    Those of which it covers a quarter; a part smaller than that (glasses) is on the patches that hold at least half
    as many of its pixels as its best patch. So every part that is on the grid at all has a true patch.

    Args:
        coverage: [P, N] of `PatchGrid.coverage`.
    """
    best = coverage.max(axis=1, keepdims=True)
    return (coverage >= np.minimum(TRUE_COVERAGE, TRUE_OF_BEST * best)) & (coverage > 0)


def gradient_relevance(model: Retriever, images: Tensor, ids: Tensor) -> Tensor:
    """Gradient times input of the patches, for the cosine of the picture's and the text's embeddings.

    The patches are the outputs of the patch convolution, before positions are added, so that what counts is what a
    patch shows and not where it lies. The value of patch n is the derivative of the cosine by s at s = 1, when the
    patch's features are multiplied by s; negative where the patch speaks against the text.

    Args:
        model: in evaluation mode; its parameters get no gradient.
        images: float [B, 3, H, W], normalised.
        ids: int64 [B, L], the token ids of one text per picture.

    Returns:
        float [B, N].
    """
    taken: list[Tensor] = []

    def take(module: nn.Module, given: tuple, output: Tensor) -> Tensor:
        taken.append(output.detach().requires_grad_())
        return taken[-1]

    with torch.no_grad():
        text = model.encode_text(ids).embedding
    handle = patch_convolution(model).register_forward_hook(take)
    try:
        with torch.enable_grad():
            similarity = F.cosine_similarity(model.encode_image(images).embedding, text).sum()
            patches = taken[0]  # [B, width, rows, columns]
            (gradient,) = torch.autograd.grad(similarity, patches)
    finally:
        handle.remove()
    return (gradient * patches).sum(dim=1).flatten(1).detach()
