"""Pre-train CLIP or IVT on SimPEDES' identity-free stream, as CLIP was on the web, or on an image-caption list.

`python -m fmfa.pretrain data/tiny_clip.safetensors --pairs 250000 --seed 0` makes the shipped CLIP (ITC), with
`--method ivt` and another file the shipped IVT (ITC, ITM and MLM). `--list FILE --images FOLDER` reads pairs from a
JSON list instead. It resumes from `OUT.resume` after an interruption and removes that file at the end.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from safetensors import SafetensorError
from torch import Tensor

from fmfa.data.datasets import DATA
from fmfa.devices import choose_device
from fmfa.errors import CheckpointError, ConfigError, FmfaError, checked, setting
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


@checked
class Settings:
    """What decides a pre-training; the tiny models' by default.

    Raises:
        ConfigError: a value outside its range, a setting of the other method, or fewer pairs than a batch.
    """

    method: Literal["clip", "ivt"] = setting("clip", "clip (ITC) or ivt (ITC, ITM and MLM)")
    pairs: int = setting(250_000, "pairs seen", ge=1)
    seed: int = setting(0, "of weights, stream, order and masks", ge=0, lt=2**31)
    batch_size: int = setting(128, "pairs per step; a contrast needs two", ge=2)
    learning_rate: float = setting(1.5e-3, "peak of AdamW; linear warm-up, then cosine to 0", ge=1e-12)
    weight_decay: float = setting(0.05, "of AdamW, on matrices only", ge=0)
    warmup: float = setting(0.03, "share of the steps in which the rate rises", ge=0, le=0.99)
    position_std: float = setting(0.4, "of the initial image positions (IVT as released: 0.02, on a ViT's)", ge=0)
    tau: float = setting(0.07, "temperature of CLIP's ITC, which is fixed; IVT learns its own", ge=1e-6)
    fusion_depth: int = setting(2, "layers of IVT's fusion encoder, which is not kept", ge=1)
    # IVT's features have a squared length near their width, so 6.7 is to the tiny one what `tau` is to CLIP; with the
    # released 0.5, 40,000 pairs left it at chance.
    temperature: float = setting(6.7, "that IVT starts from (released: 0.5)", ge=1e-6)
    matrix_scale: float = setting(0.0, "of IVT's initial matrices; 0 = sqrt(768 / width), 1 = as released", ge=0)
    precision: Literal["bf16", "fp32"] = setting("bf16", "bf16 (autocast) or fp32")
    workers: int = setting(1, "processes that make pairs", ge=0)
    device: str = setting("cpu", "cpu, cuda, or auto")
    config: str = setting("", "JSON file: an open_clip configuration, or IvtConfig's fields; empty = the tiny model's")
    vocabulary: str = setting("", "of the small tokenizer, or WordPiece; empty = the tiny model's")
    list: str = setting("", "JSON list of records with image and caption; empty = the stream")
    images: str = setting("", "folder that the list's image is relative to")

    def __post_init__(self) -> None:
        """Check what limits cannot say."""
        for name in _foreign(self.method):
            if getattr(self, name) != getattr(Settings, name):
                raise ConfigError(f"method {self.method} has no {name}; leave it out")
        if self.pairs < self.batch_size:
            raise ConfigError("fewer pairs than one batch; ask for more pairs or a smaller batch_size")

    def resolved(self) -> dict[str, Any]:
        """The settings that the method has, with its configuration read."""
        own = {name: value for name, value in asdict(self).items() if name not in _foreign(self.method)}
        return own | {"config": read_json(self.config or CONFIGS[self.method])}

    def command(self, out: Path) -> str:
        """The command that repeats this pre-training, into `data/`."""
        told = {k: v for k, v in asdict(self).items() if k in ("pairs", "seed") or v != getattr(Settings, k)}
        options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in told.items())
        return f"python -m fmfa.pretrain data/{out.name} {options}"


def _foreign(method: str) -> set[str]:
    return {name for other, names in OWN.items() if other != method for name in names}


def pretrain(out: str | Path, settings: Settings) -> dict:
    """Train a model from scratch and write what retrieval needs of it, with its record, to `out` (.safetensors, .json).

    Args:
        out: where the weights go; IVT's have the names of released checkpoints.
        settings: what to do.

    Returns:
        The record: command, settings, curve, budget (see `training_budget`), versions, time.

    Raises:
        ConfigError: vocabulary and model do not fit, a list without its folder, a place where `out` cannot be written,
            or a resume file of other settings.
        AnnotationError, ImageError: the list or a picture of it cannot be read.
        CheckpointError: the resume file is damaged, or the disk is full.
        TrainingError: a loss is not finite.
    """
    out, resolved, where = Path(out), settings.resolved(), choose_device(settings.device)
    if out.suffix != SUFFIX or out.is_dir():
        raise ConfigError(f"{out}: the weights go to a file that ends in {SUFFIX}; give such a name")
    parts = build_parts(resolved)
    training, held_out = pairs_to_see(
        parts, seed=settings.seed, count=settings.pairs, pair_list=settings.list, images=settings.images
    )
    with said_plainly(f"{out} cannot be written"):
        out.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out.parent).close()
    model = parts.model.to(where)
    held_out = {key: value.to(where) for key, value in held_out.items()}
    budget = _budget(parts, held_out)
    print(json.dumps(budget), flush=True)
    resume = out.with_suffix(".resume")
    curve, seconds = pretrain_model(model, training, held_out, resolved, resume)
    record = {
        "what": f"{parts.name} pre-trained on {settings.list or 'the identity-free stream of SimPEDES'}",
        "command": settings.command(out),
        "settings": {k: v for k, v in resolved.items() if k != "config"},
        "seconds": seconds,
        "device": device_name(where),
        "budget": budget,
        "versions": package_versions(),
        "curve": curve,
        "model": model.config,
    }
    try:
        save_checkpoint(out, parts.weights, record)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{out} cannot be written ({error}); make room and give the same command again"
        ) from error
    resume.unlink(missing_ok=True)
    return record


def pretraining_budget(method: Literal["clip", "ivt"]) -> dict[str, int]:
    """What a pair costs the tiny model of a method in pre-training; see `training_budget`."""
    parts = build_parts(Settings(method=method).resolved())
    return _budget(parts, pairs_to_see(parts, seed=0, count=0)[1])


def _budget(parts: Method, held_out: Mapping[str, Tensor]) -> dict[str, int]:
    counted = {name: value[:_COUNTED] for name, value in held_out.items()}
    return training_budget(parts.model.train(), counted, parts.kept)


def build_parts(resolved: Mapping[str, Any]) -> Method:
    """The model, words and pictures of resolved settings; ConfigError if the configuration describes no model."""
    try:
        return METHODS[resolved["method"]](resolved)
    except FmfaError:
        raise
    except Exception as error:  # a configuration holds anything, and each library has errors of its own for it
        raise ConfigError(
            f"the configuration describes no model of method {resolved['method']} "
            f"({type(error).__name__}: {' '.join(str(error).split())})"
        ) from error


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 2 an error of the package, 130 Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m fmfa.pretrain", description=__doc__)
    parser.add_argument("out", help=f"file of the weights, ending in {SUFFIX}")
    for field in fields(Settings):
        option: Any = field.default
        name = f"--{field.name.replace('_', '-')}"
        parser.add_argument(name, type=type(option.default), default=option.default, help=option.description)
    options = vars(parser.parse_args(arguments))
    try:
        record = pretrain(options.pop("out"), Settings(**options))
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


def pretraining_table() -> pd.DataFrame:
    """What each pre-trained tiny model saw and cost, read from the records beside the weights.

    Returns:
        One row per model: pairs seen, parameters (trained, and kept for retrieval), operations per pair and in all
        (forward and backward, a multiplication and an addition as two), time, and R@1 in percent among 512 held-out
        pairs. A budget missing from a record is counted again.
    """
    rows = {}
    for path in sorted(DATA.glob("tiny_*.json")):
        record = read_json(path)
        if "curve" not in record:
            continue  # a configuration
        end = record["curve"][-1]
        budget = record.get("budget") or pretraining_budget(record.get("settings", {}).get("method", "clip"))
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
