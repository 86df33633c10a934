"""Loading weights of any supported layout into a two-stream model or an IVT, with a report of what was loaded."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import timm
from open_clip.factory import HF_HUB_PREFIX
from open_clip.pretrained import (
    download_pretrained,
    download_pretrained_from_hf,
    get_pretrained_cfg,
    list_pretrained_tags_by_model,
)
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fmfa.errors import CheckpointError, ConfigError
from fmfa.files import whole_file
from fmfa.models.backbone import Grid, resize_positions, table_grid
from fmfa.models.clip import ClipRetriever
from fmfa.models.ivt import IvtRetriever
from fmfa.models.weight_files import read_state_dict, require_numbers

IRRA_HEADS = ("cross_attn.", "cross_modal_transformer.", "ln_pre_t.", "ln_pre_i.", "ln_post.", "mlm_head.")
TEXT_TOWER = ("text_projection", "positional_embedding", "token_embedding.", "transformer.", "ln_final.")
TBPS_CLIP, VIT_AND_BERT = "TBPS-CLIP", "ViT and BERT"
NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size")  # numbers in OpenAI's state dicts
NOT_ENCODERS = ("clip.logit_scale", "clip.logit_bias")
IMAGE_TOWER = "clip.visual."
IMAGE_POSITIONS = f"{IMAGE_TOWER}positional_embedding"
TEXT_POSITIONS = ("clip.positional_embedding", "clip.text.positional_embedding")
NAMED, GROUPS = 3, 6  # tensors of the model, and kinds of names in the file, that an error shows
State = Mapping[str, Tensor]
PREFIX = "encoder_vl."
TYPES = ("encoder_vl.type_embed",)  # which neither a ViT nor a BERT has
POSITION_TABLES = ("encoder_vl.pos_embed", *TYPES)
SHARED_WITH_VIT = ("cls_token", "pos_embed", "patch_embed.proj.", "norm.")


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
    reasons: Mapping[str, str]
    source: str
    layout: str

    def __str__(self) -> str:
        """Several lines: the counts, then every tensor that was not simply loaded."""
        lines = [
            f"{self.source} ({self.layout} layout): {len(self.loaded)} tensors loaded, {len(self.resized)} resized, "
            f"{len(self.left_out)} left out, {len(self.missing)} missing"
        ]
        for what in ("loaded", "resized", "left_out", "missing"):
            for name in getattr(self, what):
                reason = self.reasons.get(name, "keeps its value" if what == "missing" else "")
                if reason or what != "loaded":
                    lines.append(f"  {what.replace('_', ' '):9} {name}" + (f": {reason}" if reason else ""))
        return "\n".join(lines)


def load_weights(
    model: ClipRetriever | IvtRetriever, pretrained: str | Path | State, *, position_grid: Grid | None = None
) -> LoadReport:
    """Load what fits of a weight file into a model, and say what happened to every tensor.

    A two-stream model understands files in IRRA's layout (IRRA, FMFA, NAM, HAM: CLIP under `base_model.`), OpenAI's,
    open_clip's and TBPS-CLIP's (text encoder under `encode_text.`) CLIP files, and this project's checkpoints; an IVT
    released checkpoints, of which only `encoder_vl.*` belongs to the retriever. Image positions of another grid are
    resized bilinearly; text positions of a longer context are cut; any other tensor of another shape is left out. The
    encoders must get all of their tensors: only heads may be missing, such as an identity classifier of another data
    set.

    Args:
        model: changed in place.
        pretrained: a local file, tensors by name, or for a two-stream model a tag of open_clip for its backbone
            (`openai`) or `hf-hub:organisation/repository`.
        position_grid: (rows, columns) of the file's image positions; None decides by `table_grid`, where the file's own
            record or picture size comes first, then the model's grid and that of the backbone's configuration, of an
            IVT its pictures at any stride.

    Returns:
        The report.

    Raises:
        CheckpointError: the file cannot be found, fetched or read safely; a tensor of an encoder is missing, of another
            shape, or not of dense finite floating-point numbers; or the grid of the positions is not known. The model
            is unchanged then.
    """
    if isinstance(pretrained, Mapping):
        source, state = "the state dict", pretrained
    else:
        source = str(pretrained if isinstance(model, IvtRetriever) else find_weights(pretrained, model.backbone))
        state = read_state_dict(source)
    layout = "IVT" if isinstance(model, IvtRetriever) else _layout(state)
    return _fit(model, state, source, layout, _likely_grids(model, state, source), position_grid)


def _fit(
    model: ClipRetriever | IvtRetriever,
    state: State,
    source: str,
    layout: str,
    likely: Sequence[Mapping[Grid, str]],
    given: Grid | None,
    may_miss: Sequence[str] = NOT_ENCODERS,
) -> LoadReport:
    """Load what fits into a model, unless a part of it would keep random values; see `load_weights`.

    Args:
        model: changed in place.
        state: the tensors of the file.
        source, layout: of the report.
        likely, given: of the file's grid, for `table_grid`.
        may_miss: tensors of the encoders that may keep their values.
    """
    own = model.state_dict()
    tables: Sequence[str]
    if isinstance(model, IvtRetriever):
        network, layouts = "IVT", "IVT (released or of this project), or timm's ViT and BERT"
        tables, grid, custom_text = POSITION_TABLES, model.sizes.grid, False
        parts = {"encoder": [name for name in own if name not in may_miss]}
    else:
        network, layouts = "CLIP", "OpenAI's CLIP, open_clip, TBPS-CLIP, IRRA or this project"
        tables, grid, custom_text = (IMAGE_POSITIONS,), tuple(model.clip.visual.grid_size), hasattr(model.clip, "text")
        encoders = [name for name in own if name.startswith("clip.") and name not in may_miss]
        image = [name for name in encoders if name.startswith(IMAGE_TOWER)]
        parts = {"image encoder": image, "text encoder": [name for name in encoders if name not in image]}
    state = {name: tensor for name, tensor in state.items() if name not in NOT_WEIGHTS}
    accepted, resized, left_out, reasons, unfit = {}, [], [], {}, {}
    for name, tensor in state.items():
        target = _own_name(name, layout, custom_text)
        if target not in own:
            left_out.append(name)
            reasons[name] = "the model has no such tensor"
            continue
        require_numbers(name, tensor, source)
        ours, how = own[target], ""
        width_fits = tensor.dim() == ours.dim() > 1 and tensor.shape[-1] == ours.shape[-1]
        if target in tables and width_fits and tensor.shape[:-2] == ours.shape[:-2]:
            try:
                file_grid, what = table_grid(tensor.shape[-2] - 1, *likely, given=given)
            except ConfigError as error:
                raise CheckpointError(f"{source}: {target}: {error}") from error
            value, how = _on_grid(tensor, file_grid, what, grid)
        elif target in TEXT_POSITIONS and width_fits and len(tensor) > len(ours):
            value, how = tensor[: len(ours)], f"{len(tensor)} positions cut to the first {len(ours)}"
        elif tensor.shape == ours.shape or tensor.numel() == ours.numel() == 1:
            value = tensor
        else:
            left_out.append(name)
            reasons[name] = unfit[target] = f"{list(tensor.shape)} in the file, {list(ours.shape)} in the model"
            continue
        accepted[target] = value.reshape(ours.shape)
        resized += [target] * (value is not tensor)
        reasons |= {target: how} if how else {}
    for part, names in parts.items():
        if lost := [name for name in names if name not in accepted]:
            fitting = sum(name in accepted for names in parts.values() for name in names)
            examples = ", ".join(f"{name} ({unfit.get(name, 'not in the file')})" for name in lost[:NAMED])
            raise CheckpointError(
                f"{source}: {fitting or 'none'} of its {len(state)} tensors fit{'s' * (fitting < 2)} this model's "
                f"{network}, whose {part} would keep random values in {len(lost)} of {len(names)} tensors; looked for "
                f"{examples}{' and more' * (len(lost) > NAMED)}. The file has {_kinds(state) or 'no tensors'}. "
                f"Expected weights of the same sizes with the names of {layouts}"
            )
    model.load_state_dict(accepted, strict=False)
    loaded = tuple(name for name in accepted if name not in resized)
    missing = tuple(name for name in own if name not in accepted)
    return LoadReport(loaded, tuple(resized), tuple(left_out), missing, reasons, source, layout)


def _kinds(state: State) -> str:
    """The most frequent kinds of names, with an example of each."""
    groups: dict[str, list[str]] = {}
    for name in state:
        groups.setdefault(name.split(".")[0], []).append(name)
    largest = sorted(groups.values(), key=len, reverse=True)
    return ", ".join(f"{len(group)} like {group[0]}" for group in largest[:GROUPS])


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
    what = "is a folder" if Path(text).is_dir() else "no such file"
    if tags := list_pretrained_tags_by_model(backbone) if backbone else []:
        what += f", and {backbone} has no weights of this name, only {', '.join(tags)}"
    raise CheckpointError(f"weights {text!r}: {what}; give the path of a weight file, or hf-hub:ORGANISATION/NAME")


def _layout(state: Mapping[str, Tensor]) -> str:
    for prefix, layout in (("base_model.", "IRRA"), ("clip.", "fmfa"), ("encode_text.", TBPS_CLIP)):
        if any(name.startswith(prefix) for name in state):
            return layout
    return "CLIP"


def _own_name(name: str, layout: str, custom_text: bool) -> str:
    if layout in ("fmfa", "IVT", VIT_AND_BERT):
        return name
    if name.startswith(IRRA_HEADS):
        return f"irr.{name}"
    if name.startswith("classifier.") or (layout == "IRRA" and not name.startswith("base_model.")):
        return name
    for prefix in ("base_model.", "encode_text.", "text."):
        name = name.removeprefix(prefix)
    return f"clip.text.{name}" if custom_text and name.startswith(TEXT_TOWER) else f"clip.{name}"


def _likely_grids(model: ClipRetriever | IvtRetriever, state: State, path: str) -> list[dict[Grid, str]]:
    """Grids for `table_grid`: what the file says of itself, then those of the model and of its backbone."""
    said = {grid: "as recorded"} if (grid := recorded_grid(path)) else {}
    if isinstance(model, IvtRetriever):
        strides = (model.sizes.stride, *range(model.sizes.patch, 0, -1))
        return [said, {replace(model.sizes, stride=s).grid: f"these pictures at stride {s}" for s in strides}]
    patch = model.clip.visual.patch_size
    with suppress(KeyError, RuntimeError, ValueError, OverflowError):  # OpenAI's files have the side of their pictures
        side = int(state["input_resolution"])
        said[side // patch[0], side // patch[1]] = "of the file's input_resolution"
    size = model.config["backbone"]["vision_cfg"].get("image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    own = {(height // patch[0], width // patch[1]): "the backbone's"}
    return [said, own | {tuple(model.clip.visual.grid_size): "the model's"}]


def _on_grid(table: Tensor, grid: Grid, what: str, target: Grid) -> tuple[Tensor, str]:
    """A table of image positions [..., 1 + N, D] of `grid`, which is `what`, on `target`; and how it came there."""
    spoken, positions = f"{grid[0]} x {grid[1]}", f"{table.shape[-2] - 1} positions"
    if grid == target:
        return table, f"{positions}, grid {spoken} ({what})"
    resized = resize_positions(table.flatten(0, -2), target, source_grid=grid)
    return resized, f"{positions}, grid {spoken} to {target[0]} x {target[1]}, bilinear ({spoken}: {what})"


def start_from_vit_and_bert(
    model: IvtRetriever, vit: str | Path | State, bert: str | Path | State, *, position_grid: Grid | None = None
) -> LoadReport:
    """Start IVT from an ImageNet ViT and a BERT, as the released training does.

    The ViT gives class token, positions (resized), patch stem, attention, norms and the image MLPs; BERT
    gives the text stem and the text MLPs. Attention and norms of BERT's layers and the ViT's head are not
    used; `type_embed` keeps its random values.

    Args:
        model: receives the weights in place.
        vit: a file or state dict with timm's names, or the name of a timm model to download.
        bert: a file or state dict with transformers' names (with or without `bert.`, LayerNorm weights
            also as `gamma` and `beta`), or the name of a hub model to download.
        position_grid: (rows, columns) of the ViT's positions; None takes a square.

    Returns:
        As `load_weights`; tensors without a place in IVT are listed after `vit:` or `bert:`.

    Raises:
        CheckpointError: a name cannot be fetched, or as in `load_weights`.
    """

    def bert_of(name: str) -> nn.Module:
        from transformers import BertModel  # takes seconds

        return BertModel.from_pretrained(name)

    vit_state = _state_of(vit, lambda name: timm.create_model(name, pretrained=True), "timm")
    state = _from_vit(vit_state) | _from_bert(_state_of(bert, bert_of, "the Hugging Face hub"))
    squares = dict.fromkeys(((side, side) for side in range(1, 65)), "square, as a ViT's")
    source = " and ".join("state dict" if isinstance(part, Mapping) else str(part) for part in (vit, bert))
    return _fit(model, state, source, VIT_AND_BERT, [squares], position_grid, TYPES)


def _from_vit(state: State) -> dict[str, Tensor]:
    def renamed(name: str) -> str:
        if name.startswith(SHARED_WITH_VIT):
            return PREFIX + name
        if name.startswith("blocks."):
            return PREFIX + name.replace(".mlp.", ".mlp_vis.")
        return f"vit:{name}"

    return {renamed(name): value for name, value in state.items()}


def _from_bert(state: State) -> dict[str, Tensor]:
    feed_forward = {"intermediate": "fc1", "output": "fc2"}

    def renamed(name: str) -> str:
        parts = name.removeprefix("bert.").replace(".gamma", ".weight").replace(".beta", ".bias").split(".")
        if parts[0] == "embeddings" and parts[-1] != "position_ids":
            return PREFIX + ".".join(parts)
        match parts:
            case ["encoder", "layer", block, "intermediate" | "output" as linear, "dense", kind]:
                return f"{PREFIX}blocks.{block}.mlp_txt.{feed_forward[linear]}.{kind}"
        return f"bert:{name}"

    return {renamed(name): value for name, value in state.items()}


def _state_of(source: str | Path | State, download: Callable[[str], nn.Module], where: str) -> State:
    if isinstance(source, Mapping):
        return source
    if Path(source).is_file():
        return read_state_dict(source)
    try:
        return download(str(source)).state_dict()
    except Exception as error:
        raise CheckpointError(
            f"{str(source)!r}: no such file here, and no model of this name could be fetched from {where}; without a "
            "network, give the path of a state dict"
        ) from error


def save_checkpoint(path: str | Path, weights: nn.Module | Mapping[str, Tensor], record: Mapping) -> None:
    """Write weights as safetensors with their record, and the record once more as JSON beside it.

    Each file is written to a temporary name, flushed to disk and renamed, so an interruption leaves the
    old or the new checkpoint, never half of one. The safetensors file carries its own record, so the two
    cannot disagree.

    Args:
        path: ends in `.safetensors`; the JSON file has the same stem.
        weights: a module or its state dict.
        record: what JSON can hold; a retriever's `config` belongs under "model".
    """
    path, text = Path(path), json.dumps(record, indent=2, allow_nan=False)
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as part:
        save_file(state, part, metadata={"record": text})
    with whole_file(path.with_suffix(".json")) as part:
        part.write_text(text + "\n", encoding="utf-8")


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """Weights (on the CPU) and record of an own checkpoint.

    Raises:
        CheckpointError: no such file, not safetensors, or without a record.
    """
    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads((file.metadata() or {})["record"])
            return {name: file.get_tensor(name) for name in file.keys()}, record  # noqa: SIM118
    except Exception as error:  # of a damaged file the readers raise nearly anything
        raise CheckpointError(
            f"{path}: not a checkpoint of this project ({type(error).__name__}: {error}); expected a "
            ".safetensors file with its record"
        ) from error


def recorded_model(path: str | Path) -> dict:
    """What an own checkpoint records of its model; empty for any other file or source."""
    with suppress(Exception), safe_open(path, framework="pt") as file:
        return dict(json.loads(file.metadata()["record"])["model"])
    return {}


def recorded_grid(path: str | Path) -> tuple[int, int] | None:
    """Rows and columns of patches in the model of an own checkpoint; None where that is not known."""
    model = recorded_model(path)
    with suppress(KeyError, TypeError, ValueError, ZeroDivisionError):
        patch = model["patch"] if "patch" in model else model["backbone"]["vision_cfg"].get("patch_size", 16)
        height, width = ((int(side) - patch) // model["stride"] + 1 for side in model["image_size"])
        return height, width
    return None


def load_retriever(path: str | Path) -> ClipRetriever | IvtRetriever:
    """Rebuild the retriever of an own checkpoint, whose record has its `config` under "model", in evaluation mode.

    A configuration with a `backbone` is a `ClipRetriever`'s, any other one an `IvtRetriever`'s.

    Raises:
        CheckpointError: not such a checkpoint, or weights that do not fit the recorded model or are not dense finite
            floating-point numbers.
    """
    state, record = read_checkpoint(path)
    for name, tensor in state.items():
        require_numbers(name, tensor, path)
    try:
        kind = ClipRetriever if "backbone" in record["model"] else IvtRetriever
        model = kind.from_config(record["model"])
        model.load_state_dict(state)
    except Exception as error:  # a record holds anything
        raise CheckpointError(f"{path}: its record does not describe its weights: {error}") from error
    return model.eval()
