"""Parity of FMFA with the released implementation: every quantity of a parity file, computed again."""

import re
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from fmfa.errors import CheckpointError
from fmfa.losses import matching as losses
from fmfa.losses.efa import group_patches, sparsify
from fmfa.metrics import rank_metrics
from fmfa.models.clip import ClipRetriever
from fmfa.models.objectives import objectives
from fmfa.models.weights import IMAGE_POSITIONS, NOT_ENCODERS, load_weights
from fmfa.training.optimizer import warmup_cosine
from tests.parity.row import Row, compare

QUANTITIES = ("out/", "loss/", "gradnorm/", "grad/", "efa/", "batchloss/", "rank/", "schedule/")
POSITIONS = "model/base_model.visual.positional_embedding"
MAY_CHANGE = (IMAGE_POSITIONS, *NOT_ENCODERS)  # the temperature is fixed
GIVEN = re.compile(r"^batchloss/\d+/(image|text|pid)$|^rank/\d+/(similarity|query_pid|gallery_pid)$")
LOSSES = {
    "itc_loss": "itc",
    "sdm_loss": "sdm",
    "a-sdm_loss": "asdm",
    "cmpm_loss": "cmpm",
    "id_loss": "id",
    "mlm_loss": "irr",
    "efa_loss": "efa",
}
STATS = {"img_acc": "id_accuracy_image", "txt_acc": "id_accuracy_text", "mlm_acc": "irr_accuracy"}
SCHEDULE_BASE = 5e-6  # learning rate of the released recipe
Arrays = Mapping[str, np.ndarray]


def is_fmfa_file(arrays: Arrays) -> bool:
    """Whether the arrays of a parity file are of FMFA's layout."""
    return any(name.startswith("clip/") for name in arrays)


def fmfa_model(arrays: Arrays) -> ClipRetriever:
    """The model that a parity file describes, with its weights, in training mode and with every loss on.

    The captions of the file are given explicitly, so the retrieval branch sees them unmasked. The image positions are
    resized from the square grid of CLIP's pictures, as the released code does, which is one of the quantities.

    Raises:
        CheckpointError: the weights are not whole or not of the sizes of the file's config.
    """
    number = {name[7:]: int(arrays[name]) for name in arrays if name[:7] == "config/" and not arrays[name].ndim}
    wanted = objectives("fmfa", "released", itc=1, cmpm=1, sdm=1, irr_depth=number["depth"], retrieval_sees_mask=False)
    vision = {"image_size": number["res"], "layers": number["vl"], "width": number["vw"]}
    text = {"context_length": number["ctx"], "vocab_size": number["vocab"], "width": number["tw"]}
    model = ClipRetriever(
        {
            "embed_dim": number["embed"],
            "quick_gelu": True,
            "vision_cfg": vision | {"patch_size": number["patch"]},
            "text_cfg": text | {"layers": number["tl"], "heads": number["tw"] // 64},
        },
        wanted,
        identities=number["ids"],
        image_size=tuple(int(side) for side in arrays["config/size"]),
        stride=number["stride"],
    )
    clip = {f"base_model.{name[5:]}": arrays[name] for name in arrays if name.startswith("clip/")}
    heads = {name[6:]: arrays[name] for name in arrays if name.startswith("model/") and name != POSITIONS}
    weights = {name: torch.from_numpy(value) for name, value in (clip | heads).items()}
    model.to(weights["base_model.visual.proj"].dtype)
    side = number["res"] // number["patch"]
    report = load_weights(model, weights, position_grid=(side, side))
    if changed := [name for name in (*report.resized, *report.missing) if name not in MAY_CHANGE]:
        raise CheckpointError(f"the weights of the file do not have the sizes of its config: {', '.join(changed)}")
    return model.train()


def fmfa_rows(arrays: Arrays) -> Iterator[Row]:
    """Compute every quantity of an FMFA parity file.

    Args:
        arrays: the file as `numpy.load` gives it.

    Yields:
        The rows of `tests.parity.row.compare`; a quantity that is not known here has an infinite difference.
    """
    computed = _model_quantities(arrays) | _batch_losses(arrays) | _rankings(arrays) | _schedules(arrays)
    for name in arrays:
        if name == POSITIONS or (name.startswith(QUANTITIES) and not GIVEN.search(name)):
            yield compare(name, computed.get(name), arrays[name])


def _model_quantities(arrays: Arrays) -> dict:
    model = fmfa_model(arrays)
    batch = {
        "images": torch.from_numpy(arrays["batch/images"]),
        "caption_ids": torch.from_numpy(arrays["batch/caption_ids"]),
        "masked_ids": torch.from_numpy(arrays["batch/mlm_ids"]),
        "masked_labels": torch.from_numpy(arrays["batch/mlm_labels"]),
        "labels": torch.from_numpy(arrays["batch/pids"]),
    }
    output = model(batch)
    total = sum(output.losses[name] for name in ("asdm", "id", "irr", "efa"))
    total.backward()
    image, text = output.features["image_tokens"], output.features["text_tokens"]
    patches = image[:, 1:]
    similarity = text @ patches.transpose(1, 2)
    quantities = {
        POSITIONS: model.clip.visual.positional_embedding,
        "out/image_tokens": image,
        "out/text_tokens": text,
        "out/image_embedding": model.encode_image(batch["images"]).embedding,
        "out/text_embedding": model.encode_text(batch["caption_ids"]).embedding,
        "loss/total": total,
        "efa/similarity": similarity,
        "efa/sparse": sparsify(similarity, keep=">"),
        "efa/grouped": group_patches(text, patches, keep=">"),
        "efa/text_term": output.stats["efa_text"],
        "efa/patch_term": output.stats["efa_image"],
    }
    quantities |= {f"loss/{name}": output.losses[ours] for name, ours in LOSSES.items()}
    quantities |= {f"loss/{name}": output.stats[ours] for name, ours in STATS.items()}
    for name, parameter in model.named_parameters():
        theirs = name.removeprefix("irr.")
        if name.startswith("clip."):
            theirs = "base_model." + name.removeprefix("clip.")
        quantities[f"gradnorm/{theirs}"] = torch.tensor(-1.0)
        if parameter.grad is not None:
            quantities[f"gradnorm/{theirs}"] = parameter.grad.norm()
            quantities[f"grad/{theirs.removeprefix('base_model.')}"] = parameter.grad
    return quantities


def _batch_losses(arrays: Arrays) -> dict:
    quantities = {}
    for prefix in {name.rpartition("/")[0] for name in arrays if name.startswith("batchloss/")}:
        image, text, identity = (torch.from_numpy(arrays[f"{prefix}/{key}"]) for key in ("image", "text", "pid"))
        quantities |= {
            f"{prefix}/itc": losses.itc(image, text),
            f"{prefix}/sdm": losses.sdm(image, text, identity),
            f"{prefix}/asdm": losses.asdm(image, text, identity, alpha=0.1, form="released"),
            f"{prefix}/cmpm": losses.cmpm(image, text, identity),
        }
    return quantities


def _rankings(arrays: Arrays) -> dict:
    quantities: dict[str, Tensor | np.ndarray | float] = {}
    for prefix in {name.rpartition("/")[0] for name in arrays if name.startswith("rank/")}:
        ranked = rank_metrics(*(arrays[f"{prefix}/{key}"] for key in ("similarity", "query_pid", "gallery_pid")))
        summary = ranked.summary
        quantities[f"{prefix}/cmc"] = 100 * ranked.cmc(len(arrays[f"{prefix}/cmc"]))
        quantities |= {f"{prefix}/{name}": 100 * summary[name] for name in ("mAP", "mINP")}
    return quantities


def _schedules(arrays: Arrays) -> dict:
    return {
        name: np.array([SCHEDULE_BASE * warmup_cosine(epoch, epochs=len(rates)) for epoch in range(len(rates))])
        for name, rates in arrays.items()
        if name.startswith("schedule/cosine_")
    }
