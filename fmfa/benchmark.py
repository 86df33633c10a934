"""How fast and how large: `python -m fmfa.benchmark` renders pictures and takes training steps of each method.

Every figure comes from one run on one machine, so only the ratios travel. Peak memory is the resident memory of a fresh
process a method, over what the same process held before its first step.
"""

import json
import resource
import statistics
import subprocess
import sys
import time

import torch

from fmfa.data.datasets import open_dataset
from fmfa.simpedes.generate import pictures, recipe
from fmfa.systems import build_system
from fmfa.training.batches import TableBatches
from fmfa.training.config import TrainConfig

METHODS = ("clip", "irra", "fmfa")


def rendering_rate(size: tuple[int, int] = (96, 32), identities: int = 60) -> float:
    """Return pictures with part maps and captions a second, on one core, at a size (height, width) in pixels."""
    begun = time.process_time()
    count = sum(1 for _ in pictures(recipe("small", height=size[0], width=size[1]), "train", 0, identities))
    return count / (time.process_time() - begun)


def step(method: str, repeats: int = 7) -> dict[str, float]:
    """Return the median seconds of a step (forward and backward, batch 64 on SimPEDES) and its peak memory in MiB."""
    dataset = open_dataset("SimPEDES-street")
    config = TrainConfig(method=method).resolved()
    system = build_system(config, dataset)
    batches = TableBatches(config, dataset, system.tokenizer, masked=system.model.objectives.needs_mask)
    batch = next(iter(batches.read(0, 0)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        sum(system.model(batch).losses.values()).backward()
        seconds.append(time.perf_counter() - begun)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"seconds": statistics.median(seconds), "MiB": peak / 1024}


def main() -> None:
    """Print the rendering rate, and each method's step against IRRA's."""
    if len(sys.argv) > 1:
        print(json.dumps(step(sys.argv[1])))
        return
    for size in ((96, 32), (384, 128)):
        print(f"rendering {size[0]} x {size[1]}: {rendering_rate(size):,.0f} pictures/s on one core")
    print(f"training steps, batch 64, {torch.get_num_threads()} threads:")
    found = {}
    for method in METHODS:
        command = [sys.executable, "-m", "fmfa.benchmark", method]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        found[method] = json.loads(run.stdout.splitlines()[-1])
    for method, values in found.items():
        ratios = [values[key] / found["irra"][key] for key in ("seconds", "MiB")]
        seconds = f"{values['seconds']:.3f} s ({ratios[0]:.2f} x IRRA)"
        print(f"{method:5} {seconds}, +{values['MiB']:.0f} MiB ({ratios[1]:.2f} x)")


if __name__ == "__main__":
    main()
