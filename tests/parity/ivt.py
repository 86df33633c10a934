"""Parity of IVT with the released implementation: every quantity of a parity file, computed again."""

import re
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from fmfa.errors import CheckpointError
from fmfa.losses.matching import cmpm
from fmfa.metrics import feature_metrics
from fmfa.models.backbone import resize_positions
from fmfa.models.ivt import IvtConfig, IvtRetriever
from fmfa.models.weights import load_weights
from tests.parity.row import Row, compare

GIVEN = re.compile(r"/kept_(img|txt)$|^units/.*_(img|txt|lab|pid|in)$")  # inputs of a quantity


def is_ivt_file(arrays: Mapping[str, np.ndarray]) -> bool:
    """Whether the arrays of a parity file are of IVT's layout."""
    return any(name.startswith("state_dict/encoder_vl.") for name in arrays)


def ivt_model(arrays: Mapping[str, np.ndarray]) -> IvtRetriever:
    """The model that a parity file describes, with its weights, in float64 and without dropout.

    Raises:
        CheckpointError: the weights are not whole or not of the sizes of the file's config.
    """
    config = {name.removeprefix("config/"): arrays[name] for name in arrays if name.startswith("config/")}
    model = IvtRetriever(
        IvtConfig(
            width=int(config["embed_dim"]),
            depth=int(config["depth"]),
            heads=int(config["num_heads"]),
            mlp_ratio=float(config["mlp_ratio"]),
            image_size=tuple(int(side) for side in config["img_size"]),
            patch=int(config["patch"]),
            stride=int(config["stride"]),
            vocab_size=int(config["vocab"]),
            positions=int(config["max_position"]),
            token_types=int(config["type_vocab"]),
            drop_path=0.0,
            text_dropout=0.0,
            mask_image=0.0,
            mask_text=0.0,
        )
    )
    prefix = "state_dict/"
    weights = {n.removeprefix(prefix): torch.from_numpy(arrays[n]) for n in arrays if n.startswith(prefix)}
    if changed := load_weights(model, weights).resized:
        raise CheckpointError(f"the weights of the file do not have the sizes of its config: {', '.join(changed)}")
    return model.double()


def ivt_rows(arrays: Mapping[str, np.ndarray]) -> Iterator[Row]:
    """Compute every quantity of an IVT parity file.

    Args:
        arrays: the file as `numpy.load` gives it.

    Yields:
        The rows of `tests.parity.row.compare`; a quantity that is not known here has an infinite difference.
    """
    model = ivt_model(arrays)
    batch = {
        "images": torch.from_numpy(arrays["inputs/img"]).double(),
        "caption_ids": torch.from_numpy(arrays["inputs/ids"]),
        "attention_mask": torch.from_numpy(arrays["inputs/attention_mask"]),
        "labels": torch.from_numpy(arrays["inputs/pid3"]),
    }
    computed = _eval_quantities(model, batch) | _train_quantities(model, batch, arrays) | _unit_quantities(arrays)
    for name in arrays:
        if name.startswith(("eval/", "train/", "units/")) and not GIVEN.search(name):
            yield compare(name, computed.get(name), arrays[name])


def _quantities(model: IvtRetriever, batch: dict[str, Tensor], prefix: str, kept: tuple = (None, None)) -> dict:
    output = model(batch, *kept)
    image, text = output.features["image_tokens"], output.features["text_tokens"]
    return {
        f"{prefix}/img_feat": image[:, 0].detach(),
        f"{prefix}/txt_feat": text[:, 0].detach(),
        f"{prefix}/img_tokens": image.detach(),
        f"{prefix}/txt_tokens": text.detach(),
        f"{prefix}/cmpm": output.losses["cmpm"],
    }


def _eval_quantities(model: IvtRetriever, batch: dict[str, Tensor]) -> dict:
    with torch.no_grad():
        return _quantities(model.eval(), batch, "eval")


def _train_quantities(model: IvtRetriever, batch: dict[str, Tensor], arrays: Mapping[str, np.ndarray]) -> dict:
    model.train()
    quantities = {}
    for name in list(arrays):
        if not (match := re.fullmatch(r"train/([^/]+)/cmpm", name)):
            continue
        prefix = f"train/{match[1]}"
        kept = [
            torch.from_numpy(arrays[f"{prefix}/{key}"]) if f"{prefix}/{key}" in arrays else None
            for key in ("kept_img", "kept_txt")
        ]
        model.zero_grad()
        computed = _quantities(model, batch, prefix, kept)
        loss = computed[f"{prefix}/cmpm"]
        loss.backward()
        computed[f"{prefix}/cmpm"] = loss.detach()
        norms = {n: float(p.grad.norm()) for n, p in model.named_parameters() if p.grad is not None}
        computed[f"{prefix}/grad_norm_total"] = sum(norm * norm for norm in norms.values()) ** 0.5
        start = f"{prefix}/grad_norm/"
        for norm_name in filter(lambda n: n.startswith(start), arrays):
            computed[norm_name] = norms.get(norm_name.removeprefix(start), -1.0)
        quantities |= computed
    return quantities


def _unit_quantities(arrays: Mapping[str, np.ndarray]) -> dict:
    quantities = {}
    for name in arrays:
        if match := re.fullmatch(r"units/posembed_(\d+)x(\d+)", name):
            table = torch.from_numpy(arrays["units/posembed_in"][0])
            quantities[name] = resize_positions(table, (int(match[1]), int(match[2])))[None]
        elif match := re.fullmatch(r"(units/cmpm_\w+)_loss", name):
            quantities |= _cmpm_unit(match[1], arrays)
    if "units/metric_img" in arrays:
        quantities |= _metric_units(arrays)
    return quantities


def _cmpm_unit(prefix: str, arrays: Mapping[str, np.ndarray]) -> dict:
    image = torch.from_numpy(arrays[f"{prefix}_img"]).requires_grad_()
    text = torch.from_numpy(arrays[f"{prefix}_txt"]).requires_grad_()
    loss = cmpm(image, text, torch.from_numpy(arrays[f"{prefix}_lab"]))
    loss.backward()
    return {f"{prefix}_loss": loss.detach(), f"{prefix}_dimg": image.grad, f"{prefix}_dtxt": text.grad}


def _metric_units(arrays: Mapping[str, np.ndarray]) -> dict:
    image, text, identity = (arrays[f"units/metric_{key}"] for key in ("img", "txt", "pid"))
    unused = "(unused in reference)"
    protocols = {  # how the entries end, protocol, every n-th gallery row
        ("cuhk", ""): ("ivt", 2),
        ("icfg", ""): ("ivt", 1),
        ("cuhk_standardAP", unused): ("standard", 2),
    }
    quantities = {}
    for (name, ending), (protocol, step) in protocols.items():
        cmc, mean = f"units/metric_{name}_cmc{ending}", f"units/metric_{name}_mAP{ending}"
        if cmc in arrays:
            ranked = feature_metrics(text, image, identity, identity, protocol=protocol, gallery_step=step)
            quantities[cmc] = ranked.cmc(len(arrays[cmc]))
            quantities[mean] = ranked.summary["mAP"]
    return quantities
