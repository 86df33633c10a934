"""Loading weights from elsewhere into a two-stream model, with a report of what fitted."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from open_clip.factory import HF_HUB_PREFIX
from open_clip.pretrained import (
    download_pretrained,
    download_pretrained_from_hf,
    get_pretrained_cfg,
    list_pretrained_tags_by_model,
)
from torch import Tensor

from fmfa.errors import CheckpointError, ConfigError
from fmfa.models.backbone import resize_positions
from fmfa.models.clip import ClipRetriever
from fmfa.weights.files import read_state_dict

IRRA_HEADS = ("cross_attn.", "cross_modal_transformer.", "ln_pre_t.", "ln_pre_i.", "ln_post.", "mlm_head.")
TEXT_TOWER = ("text_projection", "positional_embedding", "token_embedding.", "transformer.", "ln_final.")
NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size")  # numbers in OpenAI's state dicts
IMAGE_POSITIONS = "clip.visual.positional_embedding"
TEXT_POSITIONS = ("clip.positional_embedding", "clip.text.positional_embedding")


@dataclass(frozen=True)
class LoadReport:
    """What became of every tensor of a weight file and of the model.

    Attributes:
        loaded: the model's tensors that were copied as they are.
        resized: the model's tensors that were copied after resizing.
        left_out: tensors of the file that were not used.
        missing: the model's tensors that the file does not have or that did not fit; they keep their
            values.
        reasons: by name, how a tensor was resized or why it was left out.
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
        for what in ("resized", "left_out", "missing"):
            for name in getattr(self, what):
                reason = self.reasons.get(name, "keeps its value" if what == "missing" else "")
                lines.append(f"  {what.replace('_', ' '):9} {name}" + (f": {reason}" if reason else ""))
        return "\n".join(lines)


def load_weights(
    model: ClipRetriever,
    pretrained: str | Path | Mapping[str, Tensor],
    *,
    position_grid: tuple[int, int] | None = None,
) -> LoadReport:
    """Load what fits of a weight file into a model, and say what happened to every tensor.

    Understands files in IRRA's layout (IRRA, FMFA, NAM, HAM: CLIP under `base_model.`), OpenAI's and
    open_clip's CLIP files, and this project's checkpoints. Image positions of another grid are resized
    bilinearly; text positions of a longer context are cut; any other tensor of another shape is left out
    (for example an identity classifier of another data set).

    Args:
        model: changed in place.
        pretrained: a local file, a tag of open_clip for the model's backbone (`openai`),
            `hf-hub:organisation/repository`, or tensors by name.
        position_grid: (rows, columns) of the file's image positions, needed where they are resized and
            the grid is not square.

    Returns:
        The report.

    Raises:
        CheckpointError: the file cannot be found, fetched or read safely, or no tensor of it fits the
            model's CLIP. The model is unchanged then.
    """
    if isinstance(pretrained, Mapping):
        path, found = "the state dict", dict(pretrained)
    else:
        path = find_weights(pretrained, model.backbone)
        found = read_state_dict(path)
    own = model.state_dict()
    layout = _layout(found)
    custom_text = hasattr(model.clip, "text")
    loaded, resized, left_out, accepted, reasons = [], [], [], {}, {}
    for name, tensor in found.items():
        target = _own_name(name, layout, custom_text)
        if name in NOT_WEIGHTS:
            continue
        if target not in own:
            left_out.append(name)
            reasons[name] = "the model has no such tensor"
        elif tensor.shape == own[target].shape or tensor.numel() == own[target].numel() == 1:
            accepted[target] = tensor.reshape(own[target].shape)
            loaded.append(target)
        elif (change := _resized(target, tensor, own[target], model, position_grid, path)) is not None:
            accepted[target], reasons[target] = change
            resized.append(target)
        else:
            left_out.append(name)
            reasons[name] = f"{list(tensor.shape)} in the file, {list(own[target].shape)} in the model"
    if not any(name.startswith("clip.") and own[name].dim() for name in accepted):
        raise CheckpointError(
            f"{path}: none of its {len(found)} tensors fits this model's CLIP (the file has for example "
            f"{', '.join(list(found)[:3])}; the model {', '.join(list(own)[:3])}). Expected weights of the "
            "same backbone, in the layout of OpenAI's CLIP, open_clip, IRRA or this project"
        )
    model.load_state_dict(accepted, strict=False)
    missing = tuple(name for name in own if name not in accepted)
    return LoadReport(tuple(loaded), tuple(resized), tuple(left_out), missing, reasons, source=str(path), layout=layout)


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
    if any(name.startswith("base_model.") for name in found):
        return "IRRA"
    return "fmfa" if any(name.startswith("clip.") for name in found) else "CLIP"


def _own_name(name: str, layout: str, custom_text: bool) -> str:
    if layout == "IRRA" and name.startswith("base_model."):
        name = name.removeprefix("base_model.")
    elif layout == "IRRA":
        return f"irr.{name}" if name.startswith(IRRA_HEADS) else name
    elif layout == "fmfa":
        return name
    if custom_text and name.startswith(TEXT_TOWER):
        name = f"text.{name}"
    elif not custom_text:
        name = name.removeprefix("text.")
    return f"clip.{name}"


def _resized(
    target: str,
    tensor: Tensor,
    own: Tensor,
    model: ClipRetriever,
    grid: tuple[int, int] | None,
    path: str | Path,
) -> tuple[Tensor, str] | None:
    """The tensor in the model's shape and a sentence, or None where it cannot be resized."""
    if tensor.dim() != 2 or tensor.shape[1] != own.shape[1]:
        return None
    if target == IMAGE_POSITIONS:
        try:
            resized = resize_positions(tensor, model.clip.visual.grid_size, source_grid=grid)
        except ConfigError as error:
            raise CheckpointError(f"{path}: {error} (position_grid)") from error
        rows, columns = model.clip.visual.grid_size
        return resized, f"{len(tensor)} positions to {len(own)} (grid {rows} x {columns}), bilinear"
    if target in TEXT_POSITIONS and len(tensor) > len(own):
        return tensor[: len(own)], f"{len(tensor)} positions cut to the first {len(own)}"
    return None
