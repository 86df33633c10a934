"""Weights for IVT: released checkpoints, and ImageNet ViT + BERT weights to start from."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from torch import Tensor

from fmfa.errors import CheckpointError, ConfigError
from fmfa.models.backbone import Grid, table_grid
from fmfa.models.ivt import IvtRetriever
from fmfa.weights.files import read_state_dict, require_numbers
from fmfa.weights.loading import LoadReport, on_grid, require_whole
from fmfa.weights.own import recorded_grid

State = Mapping[str, Tensor]

PREFIX = "encoder_vl."
TYPES = ("encoder_vl.type_embed",)  # which neither a ViT nor a BERT has
POSITION_TABLES = ("encoder_vl.pos_embed", *TYPES)
SHARED_WITH_VIT = ("cls_token", "pos_embed", "patch_embed.proj.", "norm.")


def load_ivt(
    model: IvtRetriever,
    source: str | Path | State,
    *,
    positions: Literal["resize", "keep"] = "resize",
    position_grid: Grid | None = None,
) -> LoadReport:
    """Load a released IVT checkpoint (fine-tuned or pre-trained), or any state dict with its names.

    Only `encoder_vl.*` belongs to the retriever; the unused classifier, batch norm and temperature of
    fine-tuned files and the fusion encoder of pre-trained ones are left out and listed.

    Args:
        model: receives the weights in place.
        source: a file (torch's zip or legacy container, or safetensors) or the tensors by name.
        positions: what happens to `pos_embed` and `type_embed` when the file's patch grid differs:
            "resize" interpolates them, "keep" leaves the model's own values, as the released code does
            without saying so.
        position_grid: (rows, columns) of the file's tables; None decides by `table_grid`, where the file's own record
            comes first, then the model's pictures at any stride.

    Returns:
        What was loaded, resized, left out, and what the model misses (keeps its own values).

    Raises:
        CheckpointError: the file cannot be read, a tensor of the model is missing, of another shape, or not of dense
            finite floating-point numbers, or the grid of the tables is not known. The model is unchanged then.
        ConfigError: `positions` is neither.
    """
    if positions not in ("resize", "keep"):
        raise ConfigError(f"positions {positions!r}: use 'resize' or 'keep'")
    state = dict(source) if isinstance(source, Mapping) else read_state_dict(source)
    recorded = None if isinstance(source, Mapping) else recorded_grid(source)
    strides = (model.sizes.stride, *range(model.sizes.patch, 0, -1))
    own = {replace(model.sizes, stride=stride).grid: f"these pictures at stride {stride}" for stride in strides}
    likely = [{recorded: "as recorded"} if recorded else {}, own]
    keep = positions == "keep"
    return _copy(model, state, _name(source), "IVT", likely, position_grid, POSITION_TABLES if keep else (), keep)


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
        As `load_ivt`; tensors without a place in IVT are listed after `vit:` or `bert:`.

    Raises:
        CheckpointError: a name cannot be fetched, or as in `load_ivt`.
    """
    state = _from_vit(_state_of(vit, _download_vit)) | _from_bert(_state_of(bert, _download_bert))
    squares = dict.fromkeys(((side, side) for side in range(1, 65)), "square, as a ViT's")
    return _copy(model, state, f"{_name(vit)} and {_name(bert)}", "ViT and BERT", [squares], position_grid, TYPES)


def _copy(
    model: IvtRetriever,
    state: dict[str, Tensor],
    source: str,
    layout: str,
    likely: Sequence[Mapping[Grid, str]],
    given: Grid | None,
    may_miss: Sequence[str] = (),
    keep: bool = False,
) -> LoadReport:
    own = model.state_dict()
    accepted, resized, left_out, reasons = {}, [], [], {}
    for name, value in state.items():
        if name not in own:
            left_out.append(name)
            reasons[name] = "the model has no such tensor"
            continue
        require_numbers(name, value, source)
        ours = own[name].shape
        if name in POSITION_TABLES and value.dim() == 3 and value.shape[::2] == ours[::2]:
            count = value.shape[1] - 1
            if keep and value.shape != ours:
                left_out.append(name)
                reasons[name] = f"{count} positions of another grid; the model keeps its own values"
                continue
            try:
                grid, what = table_grid(count, *likely, given=given)
            except ConfigError as error:
                raise CheckpointError(f"{source}: {name}: {error}") from error
            accepted[name], reasons[name] = on_grid(value[0], grid, what, model.sizes.grid)
            accepted[name] = accepted[name][None]
            resized += [name] * (grid != model.sizes.grid)
        elif value.shape != ours:
            raise CheckpointError(
                f"{source}: {name} has shape {tuple(value.shape)}, in the model {tuple(ours)}; "
                "build the model with the file's sizes (width, patch, vocabulary, text positions)"
            )
        else:
            accepted[name] = value
    wanted = {"encoder": [name for name in own if name not in may_miss]}
    require_whole("IVT", wanted, accepted, state, source, "IVT (released or of this project), or timm's ViT and BERT")
    model.load_state_dict(accepted, strict=False)
    return LoadReport(
        loaded=tuple(name for name in accepted if name not in resized),
        resized=tuple(resized),
        left_out=tuple(left_out),
        missing=tuple(name for name in own if name not in accepted),
        reasons=reasons,
        source=source,
        layout=layout,
    )


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


def _state_of(source: str | Path | State, download: Callable[[str], State]) -> State:
    if isinstance(source, Mapping):
        return source
    return read_state_dict(source) if Path(source).is_file() else download(str(source))


def _download_vit(name: str) -> State:
    import timm

    try:
        return timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:
        raise _unfetched(name, "timm", "a ViT state dict with timm's names") from error


def _download_bert(name: str) -> State:
    from transformers import BertModel

    try:
        return BertModel.from_pretrained(name).state_dict()
    except Exception as error:
        raise _unfetched(name, "the Hugging Face hub", "a BERT state dict (model.safetensors)") from error


def _unfetched(name: str, where: str, file: str) -> CheckpointError:
    return CheckpointError(
        f"{name!r}: no such file here, and no model of this name could be fetched from {where}; without a "
        f"network, give the path of {file}"
    )


def _name(source: str | Path | State) -> str:
    return "state dict" if isinstance(source, Mapping) else str(source)
