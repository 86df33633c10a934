"""How fast and how large: `python -m fmfa.benchmark` renders pictures and takes training steps of each method.

Every figure comes from one run on one machine, so only the ratios travel. Peak memory is that of a fresh process a
method, over what it held before its first step: resident on a CPU, of tensors on a GPU. Floating-point operations are
exact and the same on every machine; a pair is a picture with its caption, of which IVT makes three (its text levels).
`--full-size` takes the papers' networks, ViT-B/16 at 384 x 128 pixels, from random weights.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from fmfa.data.annotations import Dataset
from fmfa.data.datasets import open_dataset
from fmfa.devices import DEVICES, choose_device
from fmfa.evaluation.cost import training_flops
from fmfa.records import device_name
from fmfa.simpedes.generate import generate, pictures, recipe
from fmfa.systems import FULL_BACKBONE, NO_WEIGHTS, TINY_IVT_WEIGHTS, TINY_VOCABULARY, System, build_system
from fmfa.training.batches import TableBatches
from fmfa.training.config import TrainConfig

METHODS = ("irra", "clip", "fmfa", "ivt")  # the others are compared with the first
BATCH = 64
FULL_SIZE = (384, 128)  # height and width in pixels


def rendering_rate(size: tuple[int, int] = (96, 32), identities: int = 60) -> float:
    """Return pictures with part maps and captions a second, on one core, at a size (height, width) in pixels."""
    begun = time.process_time()
    count = sum(1 for _ in pictures(recipe("small", height=size[0], width=size[1]), "train", 0, identities))
    return count / (time.process_time() - begun)


def first_batch(method: str, folder: str | Path = "") -> tuple[nn.Module, dict[str, Tensor]]:
    """The model of a method in training mode, and its first batch of 64 pairs.

    Args:
        method: of `METHODS`.
        folder: empty for the tiny model as it starts on SimPEDES; else the papers' network with random weights, on
            pictures of 384 x 128 that are written to this folder.
    """
    config = TrainConfig(method=method, batch_size=BATCH)
    if folder:
        config = _full_size(config, Path(folder))
    elif method == "ivt" and not TINY_IVT_WEIGHTS.exists():
        config = replace(config, weights=NO_WEIGHTS)  # no figure here depends on the weights' values
    config = config.resolved()
    dataset = open_dataset(config.dataset, config.root)
    system = build_system(config, dataset)
    return system.model.train(), _batch(config, dataset, system)


def _full_size(config: TrainConfig, folder: Path) -> TrainConfig:
    height, width = FULL_SIZE
    root = generate(folder / "pictures", recipe("tiny", height=height, width=width), progress=False)
    config = replace(config, root=str(root), weights=NO_WEIGHTS, image_height=height, image_width=width, stride=16)
    if config.method != "ivt":
        return replace(config, backbone=FULL_BACKBONE)
    backbone = folder / "ivt.json"  # the released sizes except for the words, which cost nothing, and the stride above
    backbone.write_text(json.dumps({"vocab_size": len(TINY_VOCABULARY.read_text().split())}))
    return replace(config, backbone=str(backbone), stride=12)


def _batch(config: TrainConfig, dataset: Dataset, system: System) -> dict[str, Tensor]:
    masked = getattr(getattr(system.model, "objectives", None), "needs_mask", False)
    return next(iter(TableBatches(config, dataset, system.tokenizer, masked=masked).read(0, 0)))


def step(method: str, repeats: int = 7, *, folder: str = "", device: str = "cpu", precision: str = "fp32") -> dict:
    """What a step of a method on a batch of 64 pairs of SimPEDES costs, forward and backward.

    Args:
        method: of `METHODS`.
        repeats: steps that are timed, after a first one that is not.
        folder: as in `first_batch`.
        device: auto, cpu or cuda.
        precision: fp32, or bf16 for the forward pass.

    Returns:
        Median `seconds`, peak memory in `MiB`, and floating-point operations per pair in millions, `MFLOP` (see
        `training_flops`; the optimiser's few are left out).
    """
    model, batch = first_batch(method, folder)
    place = choose_device(device)
    model, batch = model.to(place), {name: value.to(place) for name, value in batch.items()}
    before, seconds = _memory(place), []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        with torch.autocast(place.type, torch.bfloat16, enabled=precision == "bf16"):
            losses = model(batch).losses
        sum(losses.values()).backward()
        if place.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    peak = _memory(place) - before
    operations = mean_flops(model, batch) * len(batch["images"]) / BATCH
    return {"seconds": statistics.median(seconds[1:]), "MiB": peak / 2**20, "MFLOP": operations / 1e6}


def _memory(device: torch.device) -> int:
    """Peak memory of this process so far, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def mean_flops(model: nn.Module, batch: dict[str, Tensor], draws: int = 8) -> float:
    """`training_flops`, for a model that drops tokens the mean of some draws of how many."""
    if not hasattr(model, "reseed"):
        return training_flops(model, batch)
    counts = []
    for seed in range(draws):
        model.reseed(seed)
        counts.append(training_flops(model, batch))
    return statistics.mean(counts)


def main(arguments: list[str] | None = None) -> None:
    """Print the rendering rate, and each method's step against IRRA's."""
    parser = argparse.ArgumentParser(prog="python -m fmfa.benchmark", description="Time rendering and training steps.")
    parser.add_argument("--full-size", action="store_true", help="ViT-B/16 at 384 x 128 in place of the tiny models")
    parser.add_argument("--device", choices=DEVICES, default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the forward pass")
    parser.add_argument("--method", choices=METHODS, help="measure this one alone and print JSON")
    parser.add_argument("--folder", help="with --method: of the pictures of --full-size, written if missing")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as own:
        folder = (options.folder or own) if options.full_size else ""
        if options.method:
            print(json.dumps(step(options.method, folder=folder, device=options.device, precision=options.precision)))
        else:
            _compare(options, folder)


def _compare(options: argparse.Namespace, folder: str) -> None:
    for size in ((96, 32), FULL_SIZE):
        print(f"rendering {size[0]} x {size[1]}: {rendering_rate(size):,.0f} pictures/s on one core")
    where = f"{device_name(choose_device(options.device))}, {torch.get_num_threads()} threads"
    print(f"training steps, batch {BATCH}, {options.precision}, {where}:", flush=True)
    given = ["--device", options.device, "--precision", options.precision]
    given += ["--full-size", "--folder", folder] if folder else []
    base: dict[str, float] = {}
    for method in METHODS:
        command = [sys.executable, "-m", "fmfa.benchmark", "--method", method, *given]
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        values = json.loads(run.stdout.splitlines()[-1])
        base = base or values
        seconds, memory, operations = (f"{values[key] / base[key]:.2f} x" for key in values)
        print(
            f"{method:5} {values['seconds']:.3f} s ({seconds} IRRA), +{values['MiB']:,.0f} MiB ({memory}), "
            f"{values['MFLOP']:,.0f} MFLOP a pair ({operations})",
            flush=True,
        )


if __name__ == "__main__":
    main()
