"""Pictures: read whole, in RGB, resized, normalised and augmented."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2

from fmfa.errors import ImageError

MAX_PIXELS = 50_000_000
"""Largest accepted width x height; a pedestrian crop has about 0.05 megapixels, a phone photo 12 to 50."""
# Named one by one: Pillow would otherwise also try formats that start other programs (EPS).
_FORMATS = ["JPEG", "JPEG2000", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP", "AVIF"]
_OUTSIDE = r"^(?:[/\\]|[A-Za-z]:)|(?:^|[/\\])\.\.(?:[/\\]|$)"
_NAMELESS = r"^[./\\]*$|\x00"
_UNKNOWN_TO_PILLOW = (".heic", ".heif", ".hif", ".jxl", ".dng")
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
# A marker in a JPEG, without those that occur alone within a scan: stuffed zeros, TEM and RST0 to RST7.
_JPEG_MARKER = re.compile(rb"\xff+([^\x00\x01\xff\xd0-\xd7])")
_JPEG_FIRST, _JPEG_START, _JPEG_END = 0xC0, 0xD8, 0xD9
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
FULL_SIZE, FULL_PAD = (384, 128), 10  # the padding of both papers belongs to this size
Size = tuple[int, int]
try:
    import pillow_heif
except ImportError:
    pass
else:
    pillow_heif.register_heif_opener()
    _FORMATS.append("HEIF")


def unsafe_path(relative: str) -> str | None:
    """Say why a path string cannot name a file inside the image folder, or None when it can."""
    if re.search(_NAMELESS, relative):
        return "names no file"
    if re.search(_OUTSIDE, relative):
        return "leaves the image folder"
    return None


def resolve_image(images: str | Path, relative: str) -> Path:
    """Join a path of the annotations to the image folder.

    Links are followed wherever they lead: they are the user's own, an annotation file cannot make any.

    Raises:
        ImageError: the path is absolute, contains `..`, or names no file.
    """
    if reason := unsafe_path(relative):
        raise ImageError(f"image path {relative!r} {reason}; expected a path relative to {images}, without '..'")
    return Path(images, relative)


def picture_suffixes() -> set[str]:
    """Endings of picture files in lower case, also of formats that `load_image` refuses."""
    kinds = Image.registered_extensions().items()
    return {suffix for suffix, kind in kinds if Image.MIME.get(kind, "").startswith("image/")}.union(_UNKNOWN_TO_PILLOW)


def load_image(path: str | Path) -> Image.Image:
    """Read one picture completely and return it as 8-bit RGB, upright.

    The size is read from the header first, so an oversized picture is refused without decoding it. The
    EXIF orientation is applied; transparency is laid over white; palettes, grey and CMYK are converted;
    16-bit grey is reduced to 8 bit by its high byte; of an animation, or several pictures, the first is taken.
    Whatever lies behind a JPEG (a phone's video, further pictures) is ignored. HEIC needs `pillow-heif`.

    Raises:
        ImageError: the file is missing, empty, not a picture of a supported format, larger than `MAX_PIXELS`,
            cut short, or in a mode without a meaning as a photograph (32-bit integer or float). The message
            names the file.
    """
    if not os.path.isfile(path):  # opening a pipe would wait for its writer
        state = "is no picture file, but a folder, pipe or broken link" if os.path.lexists(path) else "no such file"
        raise ImageError(f"{path}: {state}; check the image folder and the path in the annotations")
    try:
        with open(path, "rb") as file, Image.open(file, formats=_FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ImageError(
                    f"{path}: the header says {width:,} x {height:,} pixels, more than the {MAX_PIXELS:,} "
                    "that are accepted; shrink the picture"
                )
            image.load()
            if image.format in ("JPEG", "MPO"):
                _refuse_open_end(file, path)
            return _to_rgb(ImageOps.exif_transpose(image), path)
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{path}: too large to decode ({error}); {MAX_PIXELS:,} pixels are accepted") from None
    except Exception as error:  # Decoders fail on damaged files with nearly any exception type.
        raise ImageError(f"{path}: {_reason(path, error)}") from error


def _refuse_open_end(file: BinaryIO, path: str | Path) -> None:
    """A half-written JPEG padded with zeros decodes without complaint: walk the first picture to its end marker."""
    file.seek(0)
    data, position = file.read(), 2
    while segment := _JPEG_MARKER.search(data, position):
        marker, position = segment[1][0], segment.end()
        if marker == _JPEG_END:
            return
        if marker < _JPEG_FIRST or marker == _JPEG_START:
            break  # reserved, or another picture: the data of this one has ended
        position += int.from_bytes(data[position : position + 2])
    raise ImageError(f"{path}: cut short (a JPEG without its end marker); replace the file")


def _to_rgb(image: Image.Image, path: str | Path) -> Image.Image:
    if image.mode in ("I", "F"):
        raise ImageError(f"{path}: 32-bit {image.mode!r} pixels have no fixed range; save it as 8-bit RGB")
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _reason(path: str | Path, error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror})"
    with open(path, "rb") as file:
        head = file.read(12)
    if not head:
        return "the file is empty (0 bytes); replace it"
    if head[4:8] == b"ftyp" and head[8:] in _HEIF_BRANDS and "HEIF" not in _FORMATS:
        return "a HEIC picture, which needs one more package: pip install pillow-heif"
    if isinstance(error, Image.UnidentifiedImageError):
        formats = ", ".join(_FORMATS)
        return f"not a picture in a supported format ({formats}), or its header is damaged; replace the file"
    return f"cannot be decoded ({type(error).__name__}: {' '.join(str(error).split())}); replace the file"


@dataclass(frozen=True)
class ImageTransform:
    """How the pictures of one system are read.

    Attributes:
        size: height and width in pixels.
        interpolation: of the resize (antialiased).
        finish: uint8 [3, H, W] -> float32 [3, H, W], normalised. A training transform draws from
            torch's default CPU generator: seed that around the call, as `PairDataset` does. A part map
            (`tv_tensors.Mask`) given beside the picture gets the same draws, with 0 where the picture
            ends or is erased.
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
    erasing = v2.RandomErasing(p=0.5, scale=(0.02, 0.4), ratio=(0.3, 3.3), value=list(CLIP_MEAN))
    return ImageTransform(size, InterpolationMode.BILINEAR, _Training(size, CLIP_MEAN, CLIP_STD, erasing))


def ivt_training(size: Size) -> ImageTransform:
    """IVT's training transform without the flip.

    Bicubic resize, padding and crop as in FMFA, mean and standard deviation 0.5, then with probability
    0.5 one box of 2 to 33 % of the area, aspect 0.3 to 3.33, is filled with standard normal noise.
    """
    erasing = v2.RandomErasing(p=0.5, scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3), value="random")
    return ImageTransform(size, InterpolationMode.BICUBIC, _Training(size, HALF, HALF, erasing))


def fmfa_evaluation(size: Size) -> ImageTransform:
    """Bilinear resize and CLIP's mean and standard deviation; nothing random."""
    return ImageTransform(size, InterpolationMode.BILINEAR, _normalise(CLIP_MEAN, CLIP_STD))


def ivt_evaluation(size: Size) -> ImageTransform:
    """Bilinear resize (as released, though training is bicubic), mean and standard deviation 0.5."""
    return ImageTransform(size, InterpolationMode.BILINEAR, _normalise(HALF, HALF))


def tbps_clip_evaluation(size: Size) -> ImageTransform:
    """Bicubic resize, ImageNet's mean and standard deviation, as TBPS-CLIP (AAAI 2024) reads pictures."""
    return ImageTransform(size, InterpolationMode.BICUBIC, _normalise(IMAGENET_MEAN, IMAGENET_STD))


def _normalise(mean: tuple[float, ...], std: tuple[float, ...]) -> v2.Compose:
    return v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))])


class _Training(nn.Module):
    """Black padding, random crop, normalisation and erasing: torchvision's transforms, draw by draw and bit by bit.

    Calling those one after the other takes most of the time that loading a small picture takes.
    """

    def __init__(self, size: Size, mean: tuple, std: tuple, erasing: v2.RandomErasing):
        super().__init__()
        self.size, self.erasing = size, erasing
        self.edges = [int(FULL_PAD * now / full + 0.5) for now, full in zip(size, FULL_SIZE)]
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
        vertical, horizontal = self.edges
        self.padding = [horizontal, horizontal, vertical, vertical]
        pad = v2.Pad([horizontal, vertical, horizontal, vertical])  # left, top, right, bottom
        self.torchvision = v2.Compose([pad, v2.RandomCrop(size), _normalise(mean, std), erasing])

    def forward(self, picture: Tensor, parts: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        top, left = (int(torch.randint(0, 2 * edge + 1, size=())) if edge else 0 for edge in self.edges)
        window = ..., slice(top, top + self.size[0]), slice(left, left + self.size[1])
        picture, *maps = (
            nn.functional.pad(pixels, self.padding)[window] for pixels in (picture, parts) if pixels is not None
        )
        picture = picture.to(torch.float32).mul_(1 / 255).sub_(self.mean).div_(self.std)
        if torch.rand(1) < self.erasing.p:
            box = self.erasing.make_params([picture])
            if box["v"] is not None:
                hole = ..., slice(box["i"], box["i"] + box["h"]), slice(box["j"], box["j"] + box["w"])
                picture[hole] = box["v"]
                for values in maps:
                    values[hole] = 0
        return (picture, maps[0]) if maps else picture
