"""From a picture to the normalised tensor a network takes: FMFA's and IVT's augmentation, and evaluation.

A transform has two parts. `read` decodes and resizes, which is deterministic, so its uint8 result can be
kept; `finish` crops, normalises and erases. The horizontal flip is left to the caller, since it may have
to change the caption too; its place before or after a uniformly drawn crop makes no difference.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

from fmfa.data.images import load_image

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
FULL_SIZE, FULL_PAD = (384, 128), 10  # the padding of both papers belongs to this size

Size = tuple[int, int]


@dataclass(frozen=True)
class ImageTransform:
    """How the pictures of one system are read.

    Attributes:
        size: height and width in pixels.
        interpolation: of the resize (antialiased).
        finish: uint8 [3, H, W] -> float32 [3, H, W], normalised. A training transform draws from
            torch's default CPU generator: seed that around the call, as `PairDataset` does. A
            `tv_tensors.Mask` given beside the picture gets the same draws, with 0 where the picture ends
            or is erased.
    """

    size: Size
    interpolation: InterpolationMode
    finish: nn.Module

    def read(self, path: str | Path) -> Tensor:
        """The picture resized, uint8 [3, H, W], RGB. Raises ImageError as `load_image` does."""
        resized = v2.functional.resize(load_image(path), list(self.size), self.interpolation)
        return v2.functional.pil_to_tensor(resized)

    def __call__(self, path: str | Path) -> Tensor:
        """The picture ready for the network, float32 [3, H, W]."""
        return self.finish(self.read(path))


def fmfa_training(size: Size) -> ImageTransform:
    """FMFA's (and IRRA's) training transform without the flip.

    Bilinear resize, black padding of 10 pixels at 384 x 128 and in proportion elsewhere, random crop,
    CLIP's mean and standard deviation, then with probability 0.5 one box of 2 to 40 % of the area is
    filled with the numbers of CLIP's mean (not with zero, which would be the mean colour).
    """
    erasing = _Erasing(p=0.5, scale=(0.02, 0.4), ratio=(0.3, 3.3), value=list(CLIP_MEAN))
    return ImageTransform(size, InterpolationMode.BILINEAR, _training(size, CLIP_MEAN, CLIP_STD, erasing))


def ivt_training(size: Size) -> ImageTransform:
    """IVT's training transform without the flip.

    Bicubic resize, padding and crop as in FMFA, mean and standard deviation 0.5, then with probability
    0.5 one box of 2 to 33 % of the area, aspect 0.3 to 3.33, is filled with standard normal noise.
    """
    erasing = _Erasing(p=0.5, scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3), value="random")
    return ImageTransform(size, InterpolationMode.BICUBIC, _training(size, HALF, HALF, erasing))


def fmfa_evaluation(size: Size) -> ImageTransform:
    """Bilinear resize and CLIP's mean and standard deviation; nothing random."""
    return ImageTransform(size, InterpolationMode.BILINEAR, _normalise(CLIP_MEAN, CLIP_STD))


def ivt_evaluation(size: Size) -> ImageTransform:
    """Bilinear resize (as released, though training is bicubic), mean and standard deviation 0.5."""
    return ImageTransform(size, InterpolationMode.BILINEAR, _normalise(HALF, HALF))


def tbps_clip_evaluation(size: Size) -> ImageTransform:
    """Bicubic resize, ImageNet's mean and standard deviation, as TBPS-CLIP (AAAI 2024) reads pictures."""
    return ImageTransform(size, InterpolationMode.BICUBIC, _normalise(IMAGENET_MEAN, IMAGENET_STD))


class _Erasing(v2.RandomErasing):
    """Random erasing that blanks the same box of a mask; torchvision's own leaves masks as they are."""

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if not isinstance(inpt, tv_tensors.Mask):
            return super().transform(inpt, params)
        if params["v"] is None:
            return inpt
        blank = inpt.clone()
        blank[..., params["i"] : params["i"] + params["h"], params["j"] : params["j"] + params["w"]] = 0
        return tv_tensors.wrap(blank, like=inpt)


def _normalise(mean: tuple[float, ...], std: tuple[float, ...]) -> v2.Compose:
    return v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))])


def _training(size: Size, mean: tuple, std: tuple, erasing: v2.RandomErasing) -> v2.Compose:
    vertical, horizontal = (int(FULL_PAD * now / full + 0.5) for now, full in zip(size, FULL_SIZE))
    # Padding is [left, top, right, bottom].
    padding = [horizontal, vertical, horizontal, vertical]
    return v2.Compose([v2.Pad(padding), v2.RandomCrop(size), _normalise(mean, std), erasing])
