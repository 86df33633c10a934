"""CLIP backbones: open_clip's own towers, for non-square input and strides below the patch size."""

import math
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from open_clip import get_model_config
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from fmfa.errors import ConfigError
from fmfa.files import read_json

Grid = tuple[int, int]  # rows and columns of patches


def backbone_config(source: str | Path | Mapping) -> dict:
    """The open_clip configuration of a backbone, as a new dictionary.

    Args:
        source: a configuration (`embed_dim`, `vision_cfg`, `text_cfg`, ...), a JSON file of one, the name
            of one of open_clip's models, or `hf-hub:organisation/repository` / `local-dir:folder`.

    Raises:
        ConfigError: nothing of that name, not a configuration, or the hub cannot be reached.
    """
    if isinstance(source, Mapping):
        config = deepcopy(dict(source))
    elif str(source).endswith(".json"):
        config = read_json(str(source))
    else:
        try:
            config = get_model_config(str(source))
        except Exception as error:  # the hub client raises many unrelated classes
            raise ConfigError(
                f"the configuration of {str(source)!r} cannot be fetched ({type(error).__name__}: {error}). "
                "Without a network, give a JSON file with its open_clip configuration as the backbone and "
                "a local file as the weights"
            ) from error
        if config is None:
            raise ConfigError(
                f"no backbone {str(source)!r}: expected one of open_clip's models ("
                "for example ViT-B-16-quickgelu), hf-hub:..., a configuration or a .json file of one"
            )
    config = config.get("model_cfg", config)
    if missing := [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in config]:
        raise ConfigError(f"backbone configuration {source!r} lacks {', '.join(missing)}")
    return config


def build_clip(
    config: Mapping[str, Any],
    *,
    image_size: tuple[int, int] | None = None,
    stride: int | None = None,
    position_std: float | None = None,
) -> CLIP | CustomTextCLIP:
    """Build a CLIP of random weights from an open_clip configuration.

    Args:
        config: of `backbone_config`.
        image_size: (height, width) in pixels; None keeps the configuration's.
        stride: of the patch embedding; None means the patch size (no overlap).
        position_std: standard deviation of the initial image position embeddings; None keeps open_clip's
            width^-0.5. Small towers trained from scratch start much faster at 0.4.

    Raises:
        ConfigError: not a ViT CLIP with an open_clip text transformer, or sizes that do not fit.
    """
    parts = deepcopy(dict(config))
    vision, text = dict(parts["vision_cfg"]), parts["text_cfg"]
    if (
        vision.get("timm_model_name")
        or isinstance(vision.get("layers"), list | tuple)
        or vision.get("attentional_pool")
        or text.get("hf_model_name")
        or text.get("embed_cls")
        or "multimodal_cfg" in parts
    ):
        raise ConfigError(
            "this backbone is not a plain CLIP: expected open_clip's own VisionTransformer (no ResNet, timm "
            "tower or attention pooling) and its own text transformer (no Hugging Face tower, no CoCa)"
        )
    size = image_size or vision.get("image_size", 224)
    vision["image_size"] = (size, size) if isinstance(size, int) else tuple(int(side) for side in size)
    parts["vision_cfg"] = vision
    tower = CustomTextCLIP if parts.pop("custom_text", False) else CLIP
    try:
        clip = tower(**parts)
    except (TypeError, AssertionError, ValueError) as error:
        raise ConfigError(f"open_clip cannot build this backbone configuration: {error}") from error
    _set_stride(clip.visual, stride)
    if position_std is not None:
        nn.init.normal_(clip.visual.positional_embedding, std=position_std)
    # unused here (the temperature is fixed), and DDP refuses trainable parameters without a gradient
    for unused in (clip.logit_scale, clip.logit_bias):
        if unused is not None:
            unused.requires_grad_(False)
    return clip


def _set_stride(visual: VisionTransformer, stride: int | None) -> None:
    patch = visual.patch_size[0]
    stride = stride or patch
    if not 0 < stride <= patch or min(visual.image_size) < patch:
        raise ConfigError(
            f"stride {stride} with patch {patch} and image {visual.image_size}: expected a stride of 1 to "
            f"{patch} and an image of at least one patch"
        )
    grid = tuple((side - patch) // stride + 1 for side in visual.image_size)
    visual.conv1.stride = (stride, stride)
    visual.grid_size = grid
    width = visual.positional_embedding.shape[1]
    if len(visual.positional_embedding) != 1 + math.prod(grid):
        visual.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(1 + math.prod(grid), width))


def table_grid(count: int, *likely: Mapping[Grid, str], given: Grid | None = None) -> tuple[Grid, str]:
    """Rows and columns of a table of image positions, of which only the length is known.

    144 positions are 12 x 12 of a square picture, 18 x 8 of 288 x 128 pixels and 24 x 6 of 384 x 96. The given grid
    decides, else the likely one of this length, else the only one of a square picture or of a person's, which is 1.5
    to 4 times as high as wide.

    Args:
        count: positions of the table without the class token's.
        likely: grids (rows, columns) and what they are; the first mapping that has one of this length is used.
        given: by the user.

    Returns:
        The grid, and what it is.

    Raises:
        ConfigError: the given grid has another number of positions, or no grid or several have this one.
    """
    if given and math.prod(given) != count:
        raise ConfigError(f"position_grid is {_spoken(given)}, but the file has {count} image positions")
    found = {given: "as given"} if given else {}
    for grids in likely:
        found = found or {grid: what for grid, what in grids.items() if math.prod(grid) == count}
    if not found:
        shapes = ((count // w, w) for w in range(1, math.isqrt(max(count, 0)) + 1) if count % w == 0)
        found = {(h, w): "the only square or upright one" for h, w in shapes if h == w or 1.5 <= h / w <= 4}
    if len(found) != 1:
        what = f"a grid of {' or '.join(map(_spoken, found))}" if found else "no grid of a square or upright picture"
        raise ConfigError(
            f"{count} image positions are {what}; give the rows and columns that the weights were trained with as "
            "position_grid, such as 24x8"
        )
    return next(iter(found.items()))


def _spoken(grid: Grid) -> str:
    return f"{grid[0]} x {grid[1]}"


def resize_positions(positions: Tensor, grid: Grid, *, source_grid: Grid | None = None) -> Tensor:
    """Resize a ViT's position embeddings to another grid: bilinear, no antialias, corners not aligned.

    Args:
        positions: [1 + h * w, D], position 0 is the class token and stays.
        grid: new (rows, columns).
        source_grid: (h, w); None means a square grid.

    Returns:
        [1 + rows * columns, D] in the dtype of `positions`.
    """
    side = math.isqrt(len(positions) - 1)
    patches = positions[1:].float().T.reshape(1, -1, *(source_grid or (side, side)))
    patches = F.interpolate(patches, size=tuple(grid), mode="bilinear", antialias=False, align_corners=False)
    return torch.cat([positions[:1], patches[0].flatten(1).T.to(positions.dtype)])
