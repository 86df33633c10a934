"""Weights for IVT: released checkpoints, and ImageNet ViT + BERT weights to start from."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

from torch import Tensor

from fmfa.errors import CheckpointError, ConfigError
from fmfa.models.backbone import resize_positions
from fmfa.models.ivt import IvtRetriever
from fmfa.weights.files import read_state_dict
from fmfa.weights.loading import LoadReport

State = Mapping[str, Tensor]
Grid = tuple[int, int]

PREFIX = "encoder_vl."
POSITION_TABLES = ("encoder_vl.pos_embed", "encoder_vl.type_embed")
SHARED_WITH_VIT = ("cls_token", "pos_embed", "patch_embed.proj.", "norm.")


def load_ivt(
    model: IvtRetriever,
    source: str | Path | State,
    *,
    positions: Literal["resize", "keep"] = "resize",
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

    Returns:
        What was loaded, resized, left out, and what the model misses (keeps its own values).

    Raises:
        CheckpointError: the file cannot be read, holds no IVT weights, or a tensor has another shape. The
            model is unchanged then.
        ConfigError: `positions` is neither.
    """
    if positions not in ("resize", "keep"):
        raise ConfigError(f"positions {positions!r}: use 'resize' or 'keep'")
    state = dict(source) if isinstance(source, Mapping) else read_state_dict(source)
    return _copy(model, state, _name(source), "IVT", positions == "resize")


def start_from_vit_and_bert(model: IvtRetriever, vit: str | Path | State, bert: str | Path | State) -> LoadReport:
    """Start IVT from an ImageNet ViT and a BERT, as the released training does.

    The ViT gives class token, positions (resized), patch stem, attention, norms and the image MLPs; BERT
    gives the text stem and the text MLPs. Attention and norms of BERT's layers and the ViT's head are not
    used; `type_embed` keeps its random values.

    Args:
        model: receives the weights in place.
        vit: a file or state dict with timm's names, or the name of a timm model to download.
        bert: a file or state dict with transformers' names (with or without `bert.`, LayerNorm weights
            also as `gamma` and `beta`), or the name of a hub model to download.

    Returns:
        As `load_ivt`; tensors without a place in IVT are listed after `vit:` or `bert:`.

    Raises:
        CheckpointError: a file cannot be read, a name cannot be fetched, or a tensor has another shape.
    """
    state = _from_vit(_state_of(vit, _download_vit)) | _from_bert(_state_of(bert, _download_bert))
    return _copy(model, state, f"{_name(vit)} and {_name(bert)}", "ViT and BERT", resize=True)


def _copy(model: IvtRetriever, state: dict[str, Tensor], source: str, layout: str, resize: bool) -> LoadReport:
    own = model.state_dict()
    accepted, resized, left_out, reasons = {}, [], [], {}
    for name, value in state.items():
        if name not in own:
            left_out.append(name)
            reasons[name] = "the model has no such tensor"
        elif name in POSITION_TABLES and (grid := _source_grid(value, model, layout)) != model.sizes.grid:
            count = f"{value.shape[1] - 1} positions"
            if not resize or grid is None:
                why = "fit no grid of these images" if grid is None else "of another grid"
                left_out.append(name)
                reasons[name] = f"{count} {why}; the model keeps its own values"
                continue
            accepted[name] = resize_positions(value[0], model.sizes.grid, source_grid=grid)[None]
            resized.append(name)
            grids = "{} x {} to {} x {}".format(*grid, *model.sizes.grid)
            reasons[name] = f"{count}, grid {grids}, bilinear"
        elif value.shape != own[name].shape:
            raise CheckpointError(
                f"{source}: {name} has shape {tuple(value.shape)}, in the model {tuple(own[name].shape)}; "
                "build the model with the file's sizes (width, patch, vocabulary, text positions)"
            )
        else:
            accepted[name] = value
    if not accepted:
        raise CheckpointError(
            f"{source}: no tensor fits IVT; expected names like {PREFIX}blocks.0.attn.qkv.weight, found "
            f"{', '.join(sorted(state)[:3])} ..."
        )
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


def _source_grid(table: Tensor, model: IvtRetriever, layout: str) -> Grid | None:
    """Rows and columns of a table's patches: of an IVT's those of the model's own pictures at some stride.

    A ViT's, and an IVT's of no such length, are square; None where they cannot be.
    """
    count = table.shape[1] - 1
    if layout == "IVT":
        strides = (model.sizes.stride, *range(model.sizes.patch, 0, -1))
        for grid in (replace(model.sizes, stride=stride).grid for stride in strides):
            if math.prod(grid) == count:
                return grid
    side = math.isqrt(count)
    return (side, side) if side * side == count else None


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
