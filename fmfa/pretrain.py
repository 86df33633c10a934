"""Pre-train CLIP or IVT on SimPEDES' identity-free stream, as CLIP was on the web, or on an image-caption list.

`python -m fmfa.pretrain data/tiny_clip.safetensors --pairs 250000 --seed 0` makes the shipped CLIP (ITC), with
`--method ivt` and another file the shipped IVT (ITC, ITM and MLM). `--list FILE --images FOLDER` reads pairs from a
JSON list instead. It resumes from `OUT.resume` after an interruption and removes that file at the end.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors import SafetensorError
from torch import Tensor

from fmfa.data.datasets import DATA
from fmfa.devices import choose_device
from fmfa.errors import CheckpointError, ConfigError, FmfaError
from fmfa.evaluation.cost import training_budget
from fmfa.files import read_json, said_plainly
from fmfa.models.weights import save_checkpoint
from fmfa.pretraining.loop import pretrain_model
from fmfa.pretraining.methods import CONFIGS, METHODS, OWN, Method
from fmfa.pretraining.pairs import pairs_to_see
from fmfa.records import device_name, package_versions

SUFFIX = ".safetensors"
INTERRUPTED = 130  # a shell's exit status for Ctrl-C
_COUNTED = 64  # held-out pairs that operations are counted on
_RANGES = {
    "pairs": (1, math.inf),
    "seed": (0, 2**31 - 1),
    "batch_size": (2, math.inf),  # a contrast needs another pair
    "learning_rate": (1e-12, math.inf),
    "weight_decay": (0, math.inf),
    "warmup": (0, 0.99),
    "position_std": (0, math.inf),
    "tau": (1e-6, math.inf),
    "fusion_depth": (1, math.inf),
    "temperature": (1e-6, math.inf),
    "matrix_scale": (0, math.inf),
    "workers": (0, math.inf),
}


def pretrain(
    out: str | Path,
    *,
    method: str = "clip",
    pairs: int = 250_000,
    seed: int = 0,
    batch_size: int = 128,
    learning_rate: float = 1.5e-3,
    weight_decay: float = 0.05,
    warmup: float = 0.03,
    position_std: float = 0.4,
    tau: float = 0.07,
    fusion_depth: int = 2,
    temperature: float = 6.7,
    matrix_scale: float = 0.0,
    precision: str = "bf16",
    workers: int = 1,
    device: str = "cpu",
    config: str | Path = "",
    vocabulary: str | Path = "",
    list: str = "",
    images: str = "",
) -> dict:
    """Train a model from scratch and write what retrieval needs of it, with its record, to `out` (.safetensors, .json).

    Args:
        out: where the weights go; IVT's have the names of released checkpoints.
        method: "clip" (ITC) or "ivt" (ITC + ITM + MLM).
        pairs: pairs seen.
        seed: of weights, stream, order and masks.
        batch_size: pairs per step.
        learning_rate: peak of AdamW; linear warm-up over the share `warmup` of the steps, then cosine to 0.
        weight_decay: of AdamW, on matrices only.
        warmup: see `learning_rate`.
        position_std: of the initial image positions (IVT as released: 0.02, on top of an ImageNet ViT).
        tau: temperature of CLIP's ITC, which is fixed; IVT learns its own.
        fusion_depth: layers of IVT's fusion encoder, which is not kept.
        temperature: that IVT starts from. Its features have a squared length near their width, so 6.7 is to the tiny
            one what `tau` is to CLIP (released: 0.5; with it, 40,000 pairs left the tiny one at chance).
        matrix_scale: factor on IVT's initial matrices; 0 means sqrt(768 / width), 1 is as released.
        precision: bf16 (autocast) or fp32.
        workers: processes that make pairs.
        device: where to train: cpu, cuda, or auto.
        config: JSON file: an open_clip configuration, or the fields of `IvtConfig`; empty for the tiny model's.
        vocabulary: of the small tokenizer, or WordPiece; empty for the tiny model's.
        list: JSON list of records with `image` and `caption`; empty for the stream.
        images: folder that the list's `image` is relative to.

    Returns:
        The record: command, settings, curve, budget (see `training_budget`), versions, time.

    Raises:
        ConfigError: an unknown method, a value outside its range, a setting of the other method, vocabulary and model
            do not fit, a list without its folder, fewer pairs than a batch, a place where `out` cannot be written, or
            a resume file of other settings.
        AnnotationError, ImageError: the list or a picture of it cannot be read.
        CheckpointError: the resume file is damaged, or the disk is full.
        TrainingError: a loss is not finite.
    """
    given = {k: (str(v) if isinstance(v, Path) else v) for k, v in locals().items() if k != "out"}
    out, settings, where = Path(out), _settings(given), choose_device(device)
    if out.suffix != SUFFIX or out.is_dir():
        raise ConfigError(f"{out}: the weights go to a file that ends in {SUFFIX}; give such a name")
    parts = _parts(settings)
    training, held_out = pairs_to_see(parts, seed=seed, count=pairs, pair_list=list, images=images)
    with said_plainly(f"{out} cannot be written"):
        out.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out.parent).close()
    model = parts.model.to(where)
    held_out = {key: value.to(where) for key, value in held_out.items()}
    budget = _budget(parts, held_out)
    print(json.dumps(budget), flush=True)
    resume = out.with_suffix(".resume")
    curve, seconds = pretrain_model(model, training, held_out, settings, resume)
    record = {
        "what": f"{parts.name} pre-trained on {list or 'the identity-free stream of SimPEDES'}",
        "command": _command(out, given),
        "settings": {k: v for k, v in settings.items() if k != "config"},
        "seconds": seconds,
        "device": device_name(where),
        "budget": budget,
        "versions": package_versions(),
        "curve": curve,
        "model": parts.config,
    }
    try:
        save_checkpoint(out, parts.weights, record)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{out} cannot be written ({error}); make room and give the same command again"
        ) from error
    resume.unlink(missing_ok=True)
    return record


DEFAULTS: dict[str, Any] = pretrain.__kwdefaults__ or {}


def pretraining_budget(method: str) -> dict[str, int]:
    """What a pair costs the tiny model of a method in pre-training; see `training_budget`."""
    settings = _settings({**DEFAULTS, "method": method})
    parts = _parts(settings)
    _, held_out = pairs_to_see(parts, seed=settings["seed"], count=0)
    return _budget(parts, held_out)


def _budget(parts: Method, held_out: Mapping[str, Tensor]) -> dict[str, int]:
    counted = {name: value[:_COUNTED] for name, value in held_out.items()}
    return training_budget(parts.model.train(), counted, parts.kept)


def _parts(settings: Mapping) -> Method:
    try:
        return METHODS[settings["method"]](settings)
    except FmfaError:
        raise
    except Exception as error:  # a configuration holds anything, and each library has errors of its own for it
        raise ConfigError(
            f"the configuration describes no model of method {settings['method']} "
            f"({type(error).__name__}: {' '.join(str(error).split())})"
        ) from error


def _settings(given: Mapping) -> dict:
    """The settings that a method has, checked, with its configuration read."""
    method = given["method"]
    if method not in METHODS:
        raise ConfigError(f"method is {method!r}, expected one of {', '.join(METHODS)}")
    foreign = {name for other, names in OWN.items() if other != method for name in names}
    for name in foreign:
        if given[name] != DEFAULTS[name]:
            raise ConfigError(f"method {method} has no {name}; leave it out")
    for name, (low, high) in _RANGES.items():
        if not low <= given[name] <= high or math.isinf(given[name]):
            most = "" if math.isinf(high) else f", at most {high}"
            raise ConfigError(f"{name} is {given[name]}; expected at least {low}{most}")
    if given["precision"] not in ("bf16", "fp32"):
        raise ConfigError(f"precision is {given['precision']!r}; expected bf16 or fp32")
    if given["pairs"] < given["batch_size"]:
        raise ConfigError("fewer pairs than one batch; ask for more pairs or a smaller batch_size")
    settings = {name: value for name, value in given.items() if name not in foreign}
    return settings | {"config": read_json(given["config"] or CONFIGS[method])}


def _command(out: Path, given: Mapping) -> str:
    told = {name: value for name, value in given.items() if name in ("pairs", "seed") or value != DEFAULTS[name]}
    options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in told.items())
    return f"python -m fmfa.pretrain data/{out.name} {options}"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 2 an error of the package, 130 Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m fmfa.pretrain", description=__doc__)
    parser.add_argument("out", help=f"file of the weights, ending in {SUFFIX}")
    for name, value in DEFAULTS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    options = vars(parser.parse_args(arguments))
    out = options.pop("out")
    try:
        record = pretrain(out, **options)
    except FmfaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "interrupted; the same command goes on from the last point of the curve, if there is one", file=sys.stderr
        )
        return INTERRUPTED
    print(json.dumps(record["curve"][-1]))
    return 0


def pretraining_table(folder: str | Path = DATA) -> pd.DataFrame:
    """What each pre-trained tiny model saw and cost, read from the records beside the weights.

    Args:
        folder: where the records `tiny_*.json` lie.

    Returns:
        One row per model: pairs seen, parameters (trained, and kept for retrieval), operations per pair and in all
        (forward and backward, a multiplication and an addition as two), time, and R@1 in percent among 512 held-out
        pairs. A budget missing from a record is counted again.
    """
    rows = {}
    for path in sorted(Path(folder).glob("tiny_*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if "curve" not in record:
            continue  # a configuration
        method, end = record.get("settings", {}).get("method", "clip"), record["curve"][-1]
        budget = record.get("budget") or pretraining_budget(method)
        operations = budget["training_flops_a_pair"]
        rows[path.stem] = {
            "pairs seen": f"{end['pairs']:,}",
            "trained parameters": f"{budget['parameters']:,}",
            "kept for retrieval": f"{budget['retrieval_parameters']:,}",
            "MFLOP a pair": f"{operations / 1e6:,.0f}",
            "TFLOP in all": f"{operations * end['pairs'] / 1e12:,.0f}",
            "minutes": f"{record['seconds'] / 60:.0f} on {record['device']}",
            "held-out R@1 (%)": f"{100 * end['held_out_R@1']:.1f}",
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("weights")


if __name__ == "__main__":
    sys.exit(main())
