"""The patch grid of an image encoder, and which of its patches show a part."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from fmfa.errors import ConfigError
from fmfa.models.clip import ClipRetriever
from fmfa.models.ivt import IvtRetriever

TRUE_COVERAGE = 0.25  # a patch shows a part that covers this share of its pixels,
TRUE_OF_BEST = 0.5  # or, for a part smaller than that, this share of what its best patch has


@dataclass(frozen=True)
class PatchGrid:
    """Where the patches of an image encoder lie; sizes in pixels, patches row by row.

    Attributes:
        image_size: height and width of the input.
        patch: height and width of a patch.
        stride: between patches, down and across.
    """

    image_size: tuple[int, int]
    patch: tuple[int, int]
    stride: tuple[int, int]

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


def patch_grid(model: nn.Module) -> PatchGrid:
    """The grid of a model; ConfigError for a model without a patch convolution."""
    convolution = patch_convolution(model)
    return PatchGrid(tuple(model.config["image_size"]), convolution.kernel_size, convolution.stride)


def patch_convolution(model: nn.Module) -> nn.Conv2d:
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
