"""How fast and how large: `python -m fmfa.benchmark` renders pictures and takes training steps of each method.

Every figure comes from one run on one machine, so only the ratios travel. Peak memory is the resident memory of a fresh
process a method, over what the same process held before its first step. Floating-point operations are exact and the
same on every machine; a pair is a picture with its caption, of which IVT makes three with its text levels.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import replace

import torch
from torch import Tensor, nn

from fmfa.data.annotations import Dataset
from fmfa.data.datasets import open_dataset
from fmfa.simpedes.generate import pictures, recipe
from fmfa.systems import NO_WEIGHTS, build_system
from fmfa.systems.ivt import TINY_WEIGHTS
from fmfa.training.batches import TableBatches
from fmfa.training.budget import training_flops
from fmfa.training.config import TrainConfig

METHODS = ("clip", "irra", "fmfa", "ivt")
BATCH = 64


def rendering_rate(size: tuple[int, int] = (96, 32), identities: int = 60) -> float:
    """Return pictures with part maps and captions a second, on one core, at a size (height, width) in pixels."""
    begun = time.process_time()
    count = sum(1 for _ in pictures(recipe("small", height=size[0], width=size[1]), "train", 0, identities))
    return count / (time.process_time() - begun)


def first_batch(method: str, dataset: Dataset) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model of a method as it starts on SimPEDES, in training mode, and its first batch of 64 pairs."""
    config = TrainConfig(method=method, batch_size=BATCH).resolved()
    if method == "ivt" and not TINY_WEIGHTS.exists():
        config = replace(config, weights=NO_WEIGHTS)  # no figure here depends on the weights' values
    system = build_system(config, dataset)
    masked = getattr(getattr(system.model, "objectives", None), "needs_mask", False)
    batches = TableBatches(config, dataset, system.tokenizer, masked=masked)
    return system.model.train(), next(iter(batches.read(0, 0)))


def step(method: str, repeats: int = 7) -> dict[str, float]:
    """What a step of a method on a batch of 64 pairs of SimPEDES costs, forward and backward.

    Returns:
        Median `seconds`, peak memory in `MiB`, and floating-point operations a pair in millions, `MFLOP` (see
        `training_flops`; the optimiser's few are left out).
    """
    model, batch = first_batch(method, open_dataset("SimPEDES-street"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        sum(model(batch).losses.values()).backward()
        seconds.append(time.perf_counter() - begun)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    operations = mean_flops(model, batch) * len(batch["images"]) / BATCH
    return {"seconds": statistics.median(seconds), "MiB": peak / 1024, "MFLOP": operations / 1e6}


def mean_flops(model: nn.Module, batch: dict[str, Tensor], draws: int = 8) -> float:
    """`training_flops`, for a model that drops tokens the mean of some draws of how many."""
    if not hasattr(model, "reseed"):
        return training_flops(model, batch)
    counts = []
    for seed in range(draws):
        model.reseed(seed)
        counts.append(training_flops(model, batch))
    return statistics.mean(counts)


def main() -> None:
    """Print the rendering rate, and each method's step against IRRA's."""
    if len(sys.argv) > 1:
        print(json.dumps(step(sys.argv[1])))
        return
    for size in ((96, 32), (384, 128)):
        print(f"rendering {size[0]} x {size[1]}: {rendering_rate(size):,.0f} pictures/s on one core")
    print(f"training steps, batch {BATCH}, {torch.get_num_threads()} threads:")
    found = {}
    for method in METHODS:
        command = [sys.executable, "-m", "fmfa.benchmark", method]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        found[method] = json.loads(run.stdout.splitlines()[-1])
    for method, values in found.items():
        seconds, memory, operations = (f"{values[key] / found['irra'][key]:.2f} x" for key in values)
        print(
            f"{method:5} {values['seconds']:.3f} s ({seconds} IRRA), +{values['MiB']:.0f} MiB ({memory}), "
            f"{values['MFLOP']:.0f} MFLOP a pair ({operations})"
        )


if __name__ == "__main__":
    main()
