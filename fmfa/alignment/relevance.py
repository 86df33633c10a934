"""Relevance of each patch by the gradient of a similarity: the one map that every system has."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fmfa.alignment.patches import patch_convolution


def gradient_relevance(model: nn.Module, images: Tensor, ids: Tensor) -> Tensor:
    """Gradient times input of the patches, for the cosine of the picture's and the text's embeddings.

    The patches are the outputs of the patch convolution, before positions are added, so that what counts is what a
    patch shows and not where it lies. The value of patch n is the derivative of the cosine by s at s = 1, when the
    patch's features are multiplied by s; negative where the patch speaks against the text.

    Args:
        model: in evaluation mode; its parameters get no gradient.
        images: float [B, 3, H, W], normalised.
        ids: int64 [B, L], the token ids of one text a picture.

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
