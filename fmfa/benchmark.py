"""How fast and how large: `python -m fmfa.benchmark` renders pictures and takes training steps of each method.

A step is all of it: loading with augmentation, forward with losses, backward, and the optimiser. It is taken in turn
with the released arithmetic (`fmfa.models.plain`, with torchvision's augmentation; of IVT only that differs), so that
their ratio holds on a busy machine. On a CPU seconds are those of the process, over its threads; on a GPU the parts are
timed with a synchronisation after each, the whole step without.

Every figure comes from one run on one machine, so only the ratios travel. Peak memory is that of a fresh process per
method, over what it held before its first step: resident on a CPU, of tensors on a GPU. Floating-point operations are
exact and the same on every machine; a pair is a picture with its caption, of which IVT makes three (its text levels).
`--full-size` takes the papers' networks, ViT-B/16 at 384 x 128 pixels, from random weights.

`--gallery PICTURES` measures building and searching a gallery instead, and prints CSV.
"""

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import torch
from torch import Tensor

from fmfa.data.datasets import open_dataset
from fmfa.devices import DEVICES, choose_device
from fmfa.evaluation.cost import training_flops
from fmfa.evaluation.evaluate import encode_captions, encode_images
from fmfa.gallery import build_gallery, open_gallery
from fmfa.models.clip import ClipRetriever
from fmfa.models.outputs import Encoded, Retriever
from fmfa.models.plain import plain_losses
from fmfa.records import device_name, git_state
from fmfa.simpedes.generate import generate, pictures, recipe
from fmfa.systems import FULL_BACKBONE, NO_WEIGHTS, TINY_IVT_WEIGHTS, TINY_VOCABULARY, build_system, load_system
from fmfa.training.batches import TableBatches, training_transform
from fmfa.training.config import TrainConfig
from fmfa.training.optimizer import build_optimizer

METHODS = ("irra", "clip", "fmfa", "ivt")  # the others are compared with the first
PARTS = ("loading", "forward", "backward", "optimiser")
BATCH = 64
FULL_SIZE = (384, 128)  # height and width in pixels


def rendering_rate(size: tuple[int, int] = (96, 32), identities: int = 60) -> float:
    """Return pictures with part maps and captions per second, on one core, at a size (height, width) in pixels."""
    begun = time.process_time()
    count = sum(1 for _ in pictures(recipe("small", height=size[0], width=size[1]), "train", 0, identities))
    return count / (time.process_time() - begun)


def training(method: str, folder: str | Path = "", **changes: Any) -> tuple[TrainConfig, Retriever, TableBatches]:
    """A training of a method: its configuration, its model in training mode, and its batches of 64 pairs.

    Args:
        method: of `METHODS`.
        folder: empty for the tiny model as it starts on SimPEDES; else the papers' network with random weights, on
            pictures of 384 x 128 that are written to this folder.
        changes: to the configuration.
    """
    config = TrainConfig.from_dict({"method": method, "batch_size": BATCH} | changes)
    if folder:
        config = _full_size(config, Path(folder))
    elif method == "ivt" and not TINY_IVT_WEIGHTS.exists():
        config = replace(config, weights=NO_WEIGHTS)  # no figure here depends on the weights' values
    config = config.resolved()
    dataset = open_dataset(config.dataset, config.root)
    system = build_system(config, dataset)
    masked = getattr(getattr(system.model, "objectives", None), "needs_mask", False)
    return config, system.model.train(), TableBatches(config, dataset, system.tokenizer, masked=masked)


def _full_size(config: TrainConfig, folder: Path) -> TrainConfig:
    height, width = FULL_SIZE
    root = generate(folder / "pictures", recipe("tiny", height=height, width=width), progress=False)
    config = replace(config, root=str(root), weights=NO_WEIGHTS, image_height=height, image_width=width, stride=16)
    if config.method != "ivt":
        return replace(config, backbone=FULL_BACKBONE)
    backbone = folder / "ivt.json"  # the released sizes except for the words, which cost nothing, and the stride above
    backbone.write_text(json.dumps({"vocab_size": len(TINY_VOCABULARY.read_text().split())}))
    return replace(config, backbone=str(backbone), stride=12)


class _Steps:
    """Training steps that are timed by part, of the package or as the released arithmetic takes them."""

    def __init__(self, plain: bool, config: TrainConfig, model: Retriever, batches: TableBatches, device: torch.device):
        self.plain, self.config, self.device = plain, config, device
        self.model, self.loader = model, batches.loader
        self.optimizer = build_optimizer(model, config)
        self.dataset, self.rows = batches.pairs, cycle(batches.batches)
        self.transform = training_transform(config)
        if plain:
            self.transform = replace(self.transform, finish=self.transform.finish.get_submodule("torchvision"))
        self.losses = (
            partial(plain_losses, model) if plain and isinstance(model, ClipRetriever) else lambda b: model(b).losses
        )

    def take(self, *, waits: bool = True) -> dict[str, float]:
        """One step; seconds by part, on a GPU those until the device has done each, if this `waits` for it."""
        seconds, begun = {}, self._now(waits)

        def done(part: str) -> None:
            nonlocal begun
            now = self._now(waits)
            seconds[part], begun = now - begun, now

        rows = next(self.rows)
        self.dataset.transform = self.transform
        samples = [self.dataset[row] for row in rows]
        batch = {name: value.to(self.device) for name, value in self.loader.collate_fn(samples).items()}
        done("loading")
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            losses = self.losses(batch)
        done("forward")
        sum(losses.values(), start=torch.zeros((), device=self.device)).backward()
        done("backward")
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.plain:  # as released, the losses are read in each step
            torch.stack([norm, *losses.values()]).tolist()
        done("optimiser")
        return seconds

    def _now(self, waits: bool) -> float:
        if self.device.type == "cpu":
            return time.process_time()
        if waits:
            torch.cuda.synchronize()
        return time.perf_counter()


def step(method: str, repeats: int = 7, *, folder: str = "", device: str = "cpu", **changes: Any) -> dict[str, float]:
    """What a training step of a method on a batch of 64 pairs of SimPEDES costs.

    Args:
        method: of `METHODS`.
        repeats: steps that are timed, after a first one that is not.
        folder: as in `training`.
        device: auto, cpu or cuda.
        changes: to the configuration, such as `precision`.

    Returns:
        Median seconds of the parts `loading`, `forward`, `backward` and `optimiser` and of the whole step, `seconds`;
        of the released arithmetic, `plain_seconds` and the `ratio` to it; the peak memory of each in MiB; and
        floating-point operations per pair in millions, `MFLOP` (see `training_flops`; without the optimiser's few).
    """
    place = choose_device(device)
    config, model, batches = training(method, folder, **changes)
    model = model.to(place)
    ways = [_Steps(plain, config, model, batches, place) for plain in (False, True)]
    before, memory = _memory(place), []
    for way in ways:  # the first steps are not timed; in this order, since a CPU knows only a process' peak so far
        way.take()
        memory.append((_memory(place) - before) / 2**20)
    taken: list[list[dict]] = [[], []]
    for _ in range(repeats):
        for way, found in zip(ways, taken, strict=True):
            found.append(way.take())
    whole = [[sum(parts.values()) for parts in found] for found in taken]
    if place.type == "cuda":
        whole = [[_rate(way, repeats)] for way in ways]
    ours, plain = map(statistics.median, whole)
    parts = {name: statistics.median(parts[name] for parts in taken[0]) for name in taken[0][0]}
    batch = batches.loader.collate_fn([batches.pairs[row] for row in range(config.batch_size)])
    batch = {name: value.to(place) for name, value in batch.items()}
    operations = mean_flops(model, batch) * len(batch["images"]) / config.batch_size
    costs = {"MiB": memory[0], "plain_MiB": memory[1], "MFLOP": operations / 1e6}
    return {"seconds": ours, "plain_seconds": plain, "ratio": ours / plain, **parts, **costs}


def _rate(way: _Steps, repeats: int) -> float:
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(repeats):
        way.take(waits=False)
    torch.cuda.synchronize()
    return (time.perf_counter() - begun) / repeats


def _memory(device: torch.device) -> int:
    """Peak memory of this process so far, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def mean_flops(model: Retriever, batch: dict[str, Tensor], draws: int = 8) -> float:
    """`training_flops`, for a model that drops tokens the mean of some draws of how many."""
    reseed = getattr(model, "reseed", None)
    if reseed is None:
        return training_flops(model, batch)
    counts = []
    for seed in range(draws):
        reseed(seed)
        counts.append(training_flops(model, batch))
    return statistics.mean(counts)


class _Widened(Retriever):
    """A model with its embeddings in more dimensions, at the same angles."""

    def __init__(self, model: Retriever, size: int) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        own = model.config["backbone"]["embed_dim"]
        drawn = torch.randn(size, own, generator=torch.Generator().manual_seed(0))
        self.axes = torch.nn.Parameter(torch.linalg.qr(drawn)[0].T)

    def encode_image(self, images: Tensor) -> Encoded:
        found = self.model.encode_image(images)
        return Encoded(found.tokens, found.embedding @ self.axes)

    def encode_text(self, ids: Tensor, attention_mask: Tensor | None = None) -> Encoded:
        found = self.model.encode_text(ids, attention_mask)
        return Encoded(found.tokens, found.embedding @ self.axes)


def gallery_costs(pictures: int, size: int = 512, folder: str | Path = "") -> pd.DataFrame:
    """What building and searching a gallery of given vectors costs, on all cores that OpenMP uses.

    The vectors are between those of pairs of test pictures of SimPEDES, as the shipped CLIP encodes them, in more
    dimensions at the same angles; the queries are test captions, encoded before. One picture in 100 fits the filter.

    Elapsed time depends on what else the machine does (`load`, before), core time (of all threads) hardly.

    Returns:
        `figure`, `value`, `unit`, and what they were measured with.
    """
    folder, rng = Path(folder), np.random.default_rng(0)
    measured: dict[str, Any] = {"pictures": pictures, "dimensions": size, "threads": torch.get_num_threads()}
    measured |= {"load": round(os.getloadavg()[0], 1), "machine": device_name("cpu")}
    measured["commit"] = f"{state['commit']:.7}{'+' * bool(state['dirty'])}" if (state := git_state())["commit"] else ""
    data, system = open_dataset("SimPEDES"), load_system()
    system = replace(system, model=_Widened(system.model, size))
    rows = data.split("test")
    seen = encode_images(system.model, [data.images / name for name in rows["image"].unique()], system.transform)
    vectors = np.lib.format.open_memmap(folder / "vectors.npy", "w+", np.float16, (pictures, size))
    for start in range(0, pictures, 20_000):
        pair, share = rng.integers(0, len(seen), (2, 20_000)), rng.random((20_000, 1))
        mixed = share * seen[pair[0]].numpy() + (1 - share) * seen[pair[1]].numpy()
        vectors[start : start + 20_000] = mixed[: pictures - start]
    names = [f"{number}.jpg" for number in range(pictures)]
    pd.DataFrame({"path": names, "camera": np.arange(pictures) % 100}).to_csv(folder / "table.csv", index=False)
    given, begun = str(folder / "vectors.npy"), (time.perf_counter(), time.process_time())
    build_gallery(folder / "gallery", str(folder / "table.csv"), system, {"source": "", "model": {}}, vectors=given)
    ended = time.perf_counter(), time.process_time()
    built = [(f"building, {what}", ended[n] - begun[n], "s") for n, what in enumerate(("elapsed", "core time"))]
    built.append(("building, peak memory", _memory(torch.device("cpu")) / 2**30, "GiB"))
    queries = encode_captions(system.model, rows["caption"].sample(40, random_state=0).tolist(), system.tokenizer)
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # a fresh process, for its memory
        built += pool.apply(_search_costs, (folder / "gallery", queries))
    return pd.DataFrame(built, columns=["figure", "value", "unit"]).round(4).assign(**measured)


def _search_costs(folder: Path, queries: Tensor) -> list[tuple[str, float, str]]:
    process = psutil.Process()
    before, begun = process.memory_info().rss, time.perf_counter()
    gallery = open_gallery(folder)
    costs, found = [("opening", time.perf_counter() - begun, "s")], []
    ways: dict[str, dict[str, Any]] = {
        "exact": {"approximate": False},
        "approximate": {"approximate": True},
        "1 % by a filter": {"where": "camera = 7"},
    }
    for name, way in ways.items():
        gallery.search(queries[-1], 10, **way)
        seconds, began = [], time.process_time()
        for query in queries:
            begun = time.perf_counter()
            found.append(set(gallery.search(query, 10, **way)["path"]))
            seconds.append(time.perf_counter() - begun)
        cores = (time.process_time() - began) / len(queries)
        for how, value in (
            ("elapsed, median", statistics.median(seconds)),
            ("elapsed, least", min(seconds)),
            ("core time, mean", cores),
        ):
            costs.append((f"{name}, {how}", 1000 * value, "ms"))
        costs.append((f"{name}, memory since the start", (process.memory_info().rss - before) / 2**30, "GiB"))
    shared = [len(exact & near) for exact, near in zip(found, found[len(queries) :])][: len(queries)]
    return [*costs, ("approximate, recall@10", statistics.mean(shared) / 10, "")]


def main(arguments: list[str] | None = None) -> None:
    """Print the rendering rate, and each method's step against IRRA's."""
    parser = argparse.ArgumentParser(prog="python -m fmfa.benchmark", description="Time rendering and training steps.")
    parser.add_argument("--full-size", action="store_true", help="ViT-B/16 at 384 x 128 in place of the tiny models")
    parser.add_argument("--device", choices=DEVICES, default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the forward pass")
    parser.add_argument("--method", choices=METHODS, help="measure this one alone and print JSON")
    parser.add_argument("--folder", help="with --method: of the pictures of --full-size, written if missing")
    parser.add_argument("--gallery", type=int, default=0, metavar="PICTURES", help="measure a gallery of so many")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.folder if options.gallery else None) as own:
        if options.gallery:
            print(gallery_costs(options.gallery, folder=own).to_csv(index=False), end="")
            return
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
        seconds, memory, operations = (f"{values[key] / base[key]:.2f} x" for key in ("seconds", "MiB", "MFLOP"))
        parts = ", ".join(f"{name} {values[name] / sum(values[p] for p in PARTS):.0%}" for name in PARTS)
        print(
            f"{method:5} {values['seconds']:.3f} s ({seconds} IRRA; {values['ratio']:.2f} x the released arithmetic), "
            f"+{values['MiB']:,.0f} MiB ({memory}; {values['MiB'] / values['plain_MiB']:.2f} x released), "
            f"{values['MFLOP']:,.0f} MFLOP a pair ({operations})\n      {parts}",
            flush=True,
        )


if __name__ == "__main__":
    main()
