"""Loading weights from elsewhere into a two-stream model, with a report of what fitted."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from open_clip.factory import HF_HUB_PREFIX
from open_clip.pretrained import (
    download_pretrained,
    download_pretrained_from_hf,
    get_pretrained_cfg,
    list_pretrained_tags_by_model,
)
from torch import Tensor

from fmfa.errors import CheckpointError, ConfigError
from fmfa.models.backbone import Grid, resize_positions, table_grid
from fmfa.models.clip import ClipRetriever
from fmfa.weights.files import read_state_dict, require_numbers
from fmfa.weights.own import recorded_grid

IRRA_HEADS = ("cross_attn.", "cross_modal_transformer.", "ln_pre_t.", "ln_pre_i.", "ln_post.", "mlm_head.")
TEXT_TOWER = ("text_projection", "positional_embedding", "token_embedding.", "transformer.", "ln_final.")
TBPS_CLIP = "TBPS-CLIP"
NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size")  # numbers in OpenAI's state dicts
NOT_ENCODERS = ("clip.logit_scale", "clip.logit_bias")
IMAGE_TOWER = "clip.visual."
IMAGE_POSITIONS = f"{IMAGE_TOWER}positional_embedding"
TEXT_POSITIONS = ("clip.positional_embedding", "clip.text.positional_embedding")
NAMED, GROUPS = 3, 6  # tensors of the model, and kinds of names in the file, that an error shows


@dataclass(frozen=True)
class LoadReport:
    """What became of every tensor of a weight file and of the model.

    Attributes:
        loaded: the model's tensors that were copied as they are.
        resized: the model's tensors that were copied after resizing.
        left_out: tensors of the file that were not used.
        missing: the model's tensors that the file does not have or that did not fit; they keep their
            values.
        reasons: by name, how a tensor was taken or why it was left out.
        source: the file.
        layout: of the names in the file, for example "IRRA" or "CLIP".
    """

    loaded: tuple[str, ...]
    resized: tuple[str, ...]
    left_out: tuple[str, ...]
    missing: tuple[str, ...]
    reasons: Mapping[str, str] = field(default_factory=dict)
    source: str = "weights"
    layout: str = ""

    def __str__(self) -> str:
        """Several lines: the counts, then every tensor that was not simply loaded."""
        layout = f" ({self.layout} layout)" if self.layout else ""
        lines = [
            f"{self.source}{layout}: {len(self.loaded)} tensors loaded, {len(self.resized)} resized, "
            f"{len(self.left_out)} left out, {len(self.missing)} missing"
        ]
        for what in ("loaded", "resized", "left_out", "missing"):
            for name in getattr(self, what):
                reason = self.reasons.get(name, "keeps its value" if what == "missing" else "")
                if reason or what != "loaded":
                    lines.append(f"  {what.replace('_', ' '):9} {name}" + (f": {reason}" if reason else ""))
        return "\n".join(lines)


def load_weights(
    model: ClipRetriever,
    pretrained: str | Path | Mapping[str, Tensor],
    *,
    position_grid: Grid | None = None,
) -> LoadReport:
    """Load what fits of a weight file into a model, and say what happened to every tensor.

    Understands files in IRRA's layout (IRRA, FMFA, NAM, HAM: CLIP under `base_model.`), OpenAI's, open_clip's and
    TBPS-CLIP's (text encoder under `encode_text.`) CLIP files, and this project's checkpoints. Image positions of
    another grid are resized bilinearly; text positions of a longer context are cut; any other tensor of another shape
    is left out. Both encoders must get all of their tensors: only heads may be missing, such as an identity classifier
    of another data set.

    Args:
        model: changed in place.
        pretrained: a local file, a tag of open_clip for the model's backbone (`openai`),
            `hf-hub:organisation/repository`, or tensors by name.
        position_grid: (rows, columns) of the file's image positions; None decides by `table_grid`, where the file's own
            record or picture size comes first, then the model's grid and that of the backbone's configuration.

    Returns:
        The report.

    Raises:
        CheckpointError: the file cannot be found, fetched or read safely; a tensor of an encoder is missing, of another
            shape, or not of dense finite floating-point numbers; or the grid of the positions is not known. The model
            is unchanged then.
    """
    if isinstance(pretrained, Mapping):
        path, found = "the state dict", dict(pretrained)
    else:
        path = find_weights(pretrained, model.backbone)
        found = read_state_dict(path)
    own = model.state_dict()
    layout = _layout(found)
    custom_text = hasattr(model.clip, "text")
    likely = _likely_grids(model, found, path)
    loaded, resized, left_out, accepted, reasons, unfit = [], [], [], {}, {}, {}
    for name, tensor in found.items():
        if name in NOT_WEIGHTS:
            continue
        target = _own_name(name, layout, custom_text)
        if target not in own:
            left_out.append(name)
            reasons[name] = "the model has no such tensor"
            continue
        require_numbers(name, tensor, path)
        try:
            fitted = _fitted(target, tensor, own[target], model, likely, position_grid)
        except ConfigError as error:
            raise CheckpointError(f"{path}: {error}") from error
        if fitted is None:
            left_out.append(name)
            reasons[name] = unfit[target] = f"{list(tensor.shape)} in the file, {list(own[target].shape)} in the model"
            continue
        value, how = fitted
        accepted[target] = value.reshape(own[target].shape)
        (loaded if value is tensor else resized).append(target)
        reasons |= {target: how} if how else {}
    encoders = [name for name in own if name.startswith("clip.") and name not in NOT_ENCODERS]
    image = [name for name in encoders if name.startswith(IMAGE_TOWER)]
    towers = {"image encoder": image, "text encoder": [name for name in encoders if name not in image]}
    layouts = "OpenAI's CLIP, open_clip, TBPS-CLIP, IRRA or this project"
    require_whole("CLIP", towers, accepted, found, path, layouts, unfit)
    model.load_state_dict(accepted, strict=False)
    missing = tuple(name for name in own if name not in accepted)
    return LoadReport(tuple(loaded), tuple(resized), tuple(left_out), missing, reasons, source=str(path), layout=layout)


def require_whole(
    network: str,
    parts: Mapping[str, Sequence[str]],
    accepted: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    source: str | Path,
    layouts: str,
    unfit: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Refuse weights that would leave a part of a network with its random values.

    Args:
        network: its name.
        parts: its tensors by part.
        accepted: what it gets.
        found: the tensors of the file.
        source: of the weights.
        layouts: whose names are understood.
        unfit: why a tensor of the file does not fit the network's of this name.

    Raises:
        CheckpointError: a tensor of a part is not among `accepted`; the message says what was looked for and what is
            in the file.
    """
    for part, names in parts.items():
        lost = [name for name in names if name not in accepted]
        if not lost:
            continue
        fitting = sum(name in accepted for names in parts.values() for name in names)
        fits = f"{fitting or 'none'} of its {len(found)} tensors fit{'s' * (fitting < 2)}"
        wanted = ", ".join(f"{name} ({unfit.get(name, 'not in the file')})" for name in lost[:NAMED])
        wanted += " and more" * (len(lost) > NAMED)
        groups: dict[str, list[str]] = {}
        for name in found:
            groups.setdefault(name.split(".")[0], []).append(name)
        largest = sorted(groups.values(), key=len, reverse=True)
        held = ", ".join(f"{len(group)} like {group[0]}" for group in largest[:GROUPS])
        raise CheckpointError(
            f"{source}: {fits} this model's {network}, whose {part} would keep random values in {len(lost)} of "
            f"{len(names)} tensors; looked for {wanted}. "
            f"The file has {held or 'no tensors'}. Expected weights of the same sizes with the names of {layouts}"
        )


def find_weights(pretrained: str | Path, backbone: str | None = None) -> Path:
    """The local file of some weights; a tag or hub name is fetched through open_clip, once.

    Args:
        pretrained: see `load_weights`.
        backbone: name of the backbone that a tag belongs to.

    Raises:
        CheckpointError: neither a file nor a known tag, or the network cannot be reached.
    """
    text = str(pretrained)
    if Path(text).is_file():
        return Path(text)
    tag = get_pretrained_cfg(backbone, text) if backbone else {}
    try:
        if text.startswith(HF_HUB_PREFIX):
            return Path(download_pretrained_from_hf(text.removeprefix(HF_HUB_PREFIX)))
        if tag:
            return Path(download_pretrained(tag))
    except Exception as error:  # the download clients raise many unrelated classes
        raise CheckpointError(
            f"the weights {text!r} of {backbone!r} cannot be fetched ({type(error).__name__}: {error}). "
            "Without a network, fetch the file elsewhere and give its path instead of the name"
        ) from error
    known = list_pretrained_tags_by_model(backbone) if backbone else []
    raise CheckpointError(
        f"weights {text!r}: neither an existing file nor known for backbone {backbone!r} "
        f"(its names: {', '.join(known) or 'none'}). Give the path of a local file, or hf-hub:..."
    )


def _layout(found: Mapping[str, Tensor]) -> str:
    for prefix, layout in (("base_model.", "IRRA"), ("clip.", "fmfa"), ("encode_text.", TBPS_CLIP)):
        if any(name.startswith(prefix) for name in found):
            return layout
    return "CLIP"


def _own_name(name: str, layout: str, custom_text: bool) -> str:
    if layout == "fmfa":
        return name
    if name.startswith(IRRA_HEADS):
        return f"irr.{name}"
    if name.startswith("classifier.") or (layout == "IRRA" and not name.startswith("base_model.")):
        return name
    for prefix in ("base_model.", "encode_text.", "text."):
        name = name.removeprefix(prefix)
    return f"clip.text.{name}" if custom_text and name.startswith(TEXT_TOWER) else f"clip.{name}"


def _likely_grids(model: ClipRetriever, found: Mapping[str, Tensor], path: str | Path) -> list[dict[Grid, str]]:
    """Grids for `table_grid`: what the file says of itself, then those of the model and of its backbone."""
    said = {grid: "as recorded"} if (grid := recorded_grid(path)) else {}
    patch = model.clip.visual.patch_size
    with suppress(KeyError, RuntimeError, ValueError, OverflowError):  # OpenAI's files have the side of their pictures
        side = int(found["input_resolution"])
        said[side // patch[0], side // patch[1]] = "of the file's input_resolution"
    size = model.config["backbone"]["vision_cfg"].get("image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    own = {(height // patch[0], width // patch[1]): "the backbone's"}
    return [said, own | {tuple(model.clip.visual.grid_size): "the model's"}]


def _fitted(
    target: str,
    tensor: Tensor,
    own: Tensor,
    model: ClipRetriever,
    likely: Sequence[Mapping[Grid, str]],
    given: Grid | None,
) -> tuple[Tensor, str] | None:
    """The tensor, changed where it must be and can be, and how it was taken; None where it does not fit."""
    same_width = tensor.dim() == own.dim() == 2 and tensor.shape[1] == own.shape[1]
    if same_width and target == IMAGE_POSITIONS:
        grid, what = table_grid(len(tensor) - 1, *likely, given=given)
        return on_grid(tensor, grid, what, tuple(model.clip.visual.grid_size))
    if same_width and target in TEXT_POSITIONS and len(tensor) > len(own):
        return tensor[: len(own)], f"{len(tensor)} positions cut to the first {len(own)}"
    return (tensor, "") if tensor.shape == own.shape or tensor.numel() == own.numel() == 1 else None


def on_grid(table: Tensor, grid: Grid, what: str, target: Grid) -> tuple[Tensor, str]:
    """A table of image positions [1 + N, D] of `grid`, which is `what`, on the grid `target`; and how it came there."""
    spoken, positions = f"{grid[0]} x {grid[1]}", f"{len(table) - 1} positions"
    if grid == target:
        return table, f"{positions}, grid {spoken} ({what})"
    resized = resize_positions(table, target, source_grid=grid)
    return resized, f"{positions}, grid {spoken} to {target[0]} x {target[1]}, bilinear ({spoken}: {what})"
