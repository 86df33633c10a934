"""How fast and how large: `python -m fmfa.benchmark` renders pictures and takes training steps of each method.

A step is all of it: loading with augmentation, forward with losses, backward, and the optimiser. It is taken in turn
with the released arithmetic (`fmfa.models.plain`, with torchvision's augmentation; of IVT only that differs), so that
their ratio holds on a busy machine. On a CPU seconds are those of the process, over its threads; on a GPU the parts are
timed with a synchronisation after each, the whole step without.

Every figure comes from one run on one machine, so only the ratios travel. Peak memory is that of a fresh process per
method, over what it held before its first step: resident on a CPU, of tensors on a GPU. Floating-point operations are
exact and the same on every machine; a pair is a picture with its caption, of which IVT makes three (its text levels).
`--full-size` takes the papers' networks, ViT-B/16 at 384 x 128 pixels, from random weights.

Then come evaluation against sorting everything, and how costs grow with batch, caption, picture and gallery: of each
curve the exponent, the slope of its logarithms. `--to FOLDER` keeps all of it as `benchmark.json` and `benchmark.png`.

`--ways` measures the ways to train instead: batches of 64 and 256, with and without deterministic algorithms and
`compile`, what the loader and what the device alone could do, and tiny models side by side. It is meant for a GPU:
`python -m fmfa.benchmark --ways --full-size --device cuda --precision bf16 --minutes 7.5 --to data/results/gpu`.

`--gallery PICTURES` measures building and searching a gallery instead, and prints CSV.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import psutil
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from fmfa.data.datasets import open_dataset
from fmfa.devices import DEVICES, choose_device, repeatable
from fmfa.evaluation.cost import training_flops
from fmfa.evaluation.evaluate import encode_captions, encode_images, top_matches
from fmfa.files import said_plainly, whole_file, write_json
from fmfa.gallery import build_gallery, open_gallery
from fmfa.metrics import feature_metrics
from fmfa.models.clip import ClipRetriever
from fmfa.models.outputs import Encoded, Retriever
from fmfa.models.plain import plain_losses
from fmfa.plots.data import use_style
from fmfa.records import device_name, git_state, package_versions
from fmfa.simpedes.generate import generate, pictures, recipe
from fmfa.systems import FULL_BACKBONE, NO_WEIGHTS, TINY_IVT_WEIGHTS, TINY_VOCABULARY, build_system, load_system
from fmfa.training.batches import TableBatches, training_transform
from fmfa.training.config import TrainConfig
from fmfa.training.optimizer import build_optimizer

METHODS = ("irra", "clip", "fmfa", "ivt")  # the others are compared with the first
PARTS = ("loading", "forward", "backward", "optimiser")
BATCH = 64
FULL_SIZE = (384, 128)  # height and width in pixels
EVALUATIONS = ((10_000, 10_000), (19_848, 19_848), (40_000, 20_000))  # queries and pictures; the first is also sorted
WORKERS = 8  # that load the pictures of `--ways`
COMPILED = ("irra", "fmfa")  # what `--ways` compiles, which takes a minute each


def rendering_rate(size: tuple[int, int] = (96, 32), identities: int = 60) -> float:
    """Return pictures with part maps and captions per second, on one core, at a size (height, width) in pixels."""
    begun = time.process_time()
    count = sum(1 for _ in pictures(recipe("small", height=size[0], width=size[1]), "train", 0, identities))
    return count / (time.process_time() - begun)


def training(
    method: str, folder: str | Path = "", *, words: int = 0, **changes: Any
) -> tuple[TrainConfig, Retriever, TableBatches]:
    """A training of a method: its configuration, its model in training mode, and its batches of 64 pairs.

    Args:
        method: of `METHODS`.
        folder: empty for the tiny model as it starts on SimPEDES; else the papers' network with random weights, on
            pictures of 384 x 128 that are written to this folder.
        words: of every caption, which then is repeated or cut; 0 leaves the captions as they are.
        changes: to the configuration.
    """
    config = TrainConfig.from_dict({"method": method, "batch_size": BATCH} | changes)
    if folder:
        config = _full_size(config, Path(folder))
    elif method == "ivt" and not TINY_IVT_WEIGHTS.exists():
        config = replace(config, weights=NO_WEIGHTS)  # no figure here depends on the weights' values
    config = config.resolved()
    dataset = open_dataset(config.dataset, config.root)
    if words:
        captions = [" ".join(islice(cycle(caption.split()), words)) for caption in dataset.table["caption"]]
        dataset = replace(dataset, table=dataset.table.assign(caption=captions))
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
        forward = torch.compile(model) if config.compile else model
        self.losses = (
            partial(plain_losses, model) if plain and isinstance(model, ClipRetriever) else lambda b: forward(b).losses
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
        self.compute(batch, done)
        return seconds

    def compute(self, batch: dict[str, Tensor], done: Callable[[str], None] = lambda part: None) -> None:
        """A step on a batch that is on the device; `done` is called behind each part."""
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
        whole = [[_rate(partial(way.take, waits=False), repeats, place)] for way in ways]
    ours, plain = map(statistics.median, whole)
    parts = {name: statistics.median(parts[name] for parts in taken[0]) for name in taken[0][0]}
    batch = batches.loader.collate_fn([batches.pairs[row] for row in range(config.batch_size)])
    batch = {name: value.to(place) for name, value in batch.items()}
    operations = mean_flops(model, batch) * len(batch["images"]) / config.batch_size
    costs = {"MiB": memory[0], "plain_MiB": memory[1], "MFLOP": operations / 1e6}
    return {"seconds": ours, "plain_seconds": plain, "ratio": ours / plain, **parts, **costs}


def _rate(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Wall-clock seconds a run; a GPU is waited for at the ends only."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    begun = time.perf_counter()
    for _ in range(repeats):
        run()
    wait()
    return (time.perf_counter() - begun) / repeats


def _memory(device: torch.device) -> int:
    """Peak memory of this process so far, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def ways(
    method: str,
    repeats: int,
    folder: str = "",
    *,
    device: str = "cpu",
    batches: tuple[int, ...] = (BATCH, 4 * BATCH),
    workers: int = WORKERS,
    **changes: Any,
) -> Iterator[dict[str, Any]]:
    """What the ways to train a method cost: seconds of a step on the device alone and of a batch in the loader alone.

    Yields:
        One row a way: `method`, `batch`, `deterministic`, `compile`; `seconds` a step whose batch is on the device, and
        `loading` of a batch by so many `workers`; the peak memory of tensors in `MiB` (of a GPU); `TFLOPs` a second,
        and their share `utilisation` of what a large matrix product reaches in this precision.
    """
    place, built, first = choose_device(device), 0, batches[0]
    cases = [(first, True, False), (first, False, False), *((size, True, False) for size in batches[1:])]
    if method in COMPILED:
        cases.append((first, True, True))  # last, as the only one that may fail
    for size, deterministic, compiled in cases:
        if size != built:
            config, model, table = training(method, folder, batch_size=size, workers=workers, **changes)
            built, model, read = size, model.to(place), iter(table.read(0, 0))
            batch = {name: value.to(place) for name, value in next(read).items()}
            begun = time.perf_counter()
            loaded = sum(1 for _ in islice(read, repeats))
            loading = (time.perf_counter() - begun) / loaded if loaded else None
            del read
            small = {name: value[: -(-len(value) * BATCH // max(size, BATCH))] for name, value in batch.items()}
            operations = mean_flops(model, small) * len(batch["images"])
        step = _Steps(False, replace(config, compile=compiled), model, table, place)
        if place.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with repeatable(place) if deterministic else contextlib.nullcontext():
            step.compute(batch)
            step.compute(batch)
            seconds = _rate(partial(step.compute, batch), repeats, place)
        row = {"method": method, "batch": size, "deterministic": deterministic, "compile": compiled}
        row |= {"seconds": seconds, "loading": loading, "workers": workers, "MiB": _memory(place) / 2**20}
        rate = operations / seconds
        yield row | {"TFLOPs": rate / 1e12, "utilisation": rate / _largest_rate(place, config.precision)}


def _largest_rate(device: torch.device, precision: str) -> float:
    """Operations a second of a large matrix product in a precision, the best of five."""
    size, seconds = 8192 if device.type == "cuda" else 1024, []
    matrix = torch.ones(size, size, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    for _ in range(5):
        seconds.append(_rate(lambda: matrix @ matrix, 5, device))
    return 2 * size**3 / min(seconds)


def side_by_side(count: int, device: str, seconds: float = 10.0, **changes: Any) -> float:
    """Training steps a second of `count` tiny models of IRRA together, each in a process of its own."""
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(count)
    with context.Pool(count, _share, (start,)) as pool:
        return sum(pool.starmap(_steps_alone, [(device, seconds, changes)] * count, chunksize=1))


def _share(start: Any) -> None:
    globals()["_start"] = start


def _steps_alone(device: str, seconds: float, changes: dict[str, Any]) -> float:
    place = choose_device(device)
    torch.set_num_threads(1)
    config, model, batches = training("irra", **changes)
    steps, taken = _Steps(False, config, model.to(place), batches, place), 0
    steps.take(waits=False)
    globals()["_start"].wait()
    begun = time.perf_counter()
    while time.perf_counter() - begun < seconds:
        steps.take(waits=False)
        taken += 1
    if place.type == "cuda":  # which may be far behind
        torch.cuda.synchronize()
    return taken / (time.perf_counter() - begun)


def evaluation(queries: int, gallery: int, size: int = 512, *, sorts: bool = False) -> dict[str, float]:
    """What ranking a gallery exactly costs, or sorting all of it as the released codes do.

    The features are of 1,000 people around whom pictures and captions scatter.

    Returns:
        `seconds` of the process; `MiB`, the peak memory over the features'; `R@1` and `mAP`.
    """
    draw = torch.Generator().manual_seed(0)
    people = torch.randn(1000, size, generator=draw)
    wanted, shown = torch.arange(queries) % 1000, torch.arange(gallery) % 1000
    query, pictures = (people[of] + 3 * torch.randn(len(of), size, generator=draw) for of in (wanted, shown))
    before, begun = _memory(torch.device("cpu")), time.process_time()
    rank = _sorted_ranks if sorts else _ranks
    first, precision = rank(query, pictures, wanted, shown)
    seconds = time.process_time() - begun
    memory = (_memory(torch.device("cpu")) - before) / 2**20
    found = {"seconds": seconds, "MiB": memory, "R@1": first, "mAP": precision}
    return {"queries": queries, "gallery": gallery, "sorts": sorts, **found}


def _ranks(query: Tensor, gallery: Tensor, wanted: Tensor, shown: Tensor) -> tuple[float, float]:
    found = feature_metrics(query, gallery, wanted, shown).summary
    return found["R@1"], found["mAP"]


def _sorted_ranks(query: Tensor, gallery: Tensor, wanted: Tensor, shown: Tensor) -> tuple[float, float]:
    similarity = F.normalize(query, dim=1) @ F.normalize(gallery, dim=1).T
    order = similarity.argsort(dim=1, descending=True)
    hits = shown[order] == wanted[:, None]
    found, ranks = hits.cumsum(1), torch.arange(1, len(gallery) + 1)
    precision = (found / ranks * hits).sum(1) / hits.sum(1)
    return float(hits[:, 0].double().mean()), float(precision.nanmean())


def curves(device: str = "cpu", repeats: int = 3, sizes: int = 4) -> list[dict[str, Any]]:
    """How costs grow: seconds over the batch, words of captions, pixels of pictures and pictures of a gallery.

    Args:
        device: of the training steps.
        repeats: of which the median counts.
        sizes: points a curve, each of twice the size before.

    Returns:
        One entry a curve: `of`, `over`, the sizes `x`, `seconds`, and the `exponent`.
    """
    found = []
    for over, settings in (
        ("pairs in a batch", [(n, {"batch_size": n}) for n in (8, 16, 32, 64)]),
        ("words in a caption", [(n, {"words": n, "batch_size": 16}) for n in (8, 16, 32, 64)]),
        ("pixels of a picture", [(3 * n * n, {"image_height": 3 * n, "image_width": n, "batch_size": 16})
                                 for n in (16, 24, 32, 48)]),
    ):  # fmt: skip
        for method in METHODS:
            seconds = [_step_seconds(method, repeats, device, **changes) for _, changes in settings[:sizes]]
            found.append(_curve(f"step of {method}", over, [x for x, _ in settings[:sizes]], seconds))
    draw, pictures = torch.Generator().manual_seed(0), [5_000 * 2**n for n in range(sizes)]
    stored, query = torch.randn(pictures[-1], 512, generator=draw), torch.randn(512, generator=draw)
    people = torch.arange(pictures[-1]) % 1000
    runs: dict[str, Callable[[int], object]] = {
        "exact search of a caption": lambda n: top_matches(stored[:n] @ query),
        "evaluation of 500 captions": lambda n: _ranks(stored[:500], stored[:n], people[:500], people[:n]),
    }
    for name, run in runs.items():
        seconds = []
        for count in pictures:
            run(count)
            seconds.append(statistics.median(_process_seconds(partial(run, count)) for _ in range(repeats)))
        found.append(_curve(name, "pictures in a gallery", pictures, seconds))
    return found


def _step_seconds(method: str, repeats: int, device: str, **changes: Any) -> float:
    place = choose_device(device)
    config, model, batches = training(method, **changes)
    steps = _Steps(False, config, model.to(place), batches, place)
    return statistics.median([sum(steps.take().values()) for _ in range(repeats + 1)][1:])


def _process_seconds(run: Callable[[], object]) -> float:
    begun = time.process_time()
    run()
    return time.process_time() - begun


def _curve(of: str, over: str, x: list[int], seconds: list[float]) -> dict[str, Any]:
    exponent = float(np.polyfit(np.log(x), np.log(seconds), 1)[0]) if len(x) > 1 else float("nan")
    return {"of": of, "over": over, "x": x, "seconds": seconds, "exponent": exponent}


def plot_curves(found: list[dict[str, Any]]) -> Figure:
    """One panel for each thing that costs grow with, both axes logarithmic, the exponents in the legends."""
    use_style()
    kinds = list(dict.fromkeys(curve["over"] for curve in found))
    figure, axes = plt.subplots(1, len(kinds), figsize=(3.2 * len(kinds), 3.0), layout="constrained")
    for axis, over in zip(axes, kinds, strict=True):
        shown = [curve for curve in found if curve["over"] == over]
        for curve in shown:
            label = f"{curve['of'].removeprefix('step of ')}: {curve['exponent']:.2f}"
            axis.loglog(curve["x"], curve["seconds"], "o-", markersize=3, label=label)
        axis.set_xticks(shown[0]["x"], [f"{size:,}" for size in shown[0]["x"]])
        axis.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        axis.set_xlabel(over)
        axis.legend(title="exponent", fontsize=7, title_fontsize=7)
    axes[0].set_ylabel("seconds of the process")
    return figure


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
    """Print the rendering rate, each method's step against IRRA's, evaluation and cost curves; or what is asked for."""
    parser = argparse.ArgumentParser(prog="python -m fmfa.benchmark", description="Time rendering and training steps.")
    parser.add_argument("--full-size", action="store_true", help="ViT-B/16 at 384 x 128 in place of the tiny models")
    parser.add_argument("--device", choices=DEVICES, default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the forward pass")
    parser.add_argument("--method", choices=METHODS, help="measure this one alone and print JSON")
    parser.add_argument("--folder", help="with --method: of the pictures of --full-size, written if missing")
    parser.add_argument("--ways", action="store_true", help="measure the ways to train instead")
    parser.add_argument("--batch", type=int, default=BATCH, help="pairs; --ways measures four times as many too")
    parser.add_argument("--repeats", type=int, default=7, help="steps that are timed")
    parser.add_argument("--minutes", type=float, default=60.0, help="after which --ways ends with what it has")
    parser.add_argument("--to", metavar="FOLDER", help="keep what was found there, as JSON and a figure")
    parser.add_argument("--gallery", type=int, default=0, metavar="PICTURES", help="measure a gallery of so many")
    options = parser.parse_args(arguments)
    given: dict[str, Any] = {"device": options.device, "precision": options.precision}
    with tempfile.TemporaryDirectory(dir=options.folder if options.gallery else None) as own:
        if options.gallery:
            print(gallery_costs(options.gallery, folder=own).to_csv(index=False), end="")
            return
        folder = (options.folder or own) if options.full_size else ""
        if options.method and options.ways:
            for row in ways(
                options.method, options.repeats, folder, batches=(options.batch, 4 * options.batch), **given
            ):
                print(json.dumps(row), flush=True)
        elif options.method:
            print(json.dumps(step(options.method, options.repeats, folder=folder, batch_size=options.batch, **given)))
        else:
            found = _measure_ways(options, folder) if options.ways else _compare(options, folder)
            if options.to:
                _keep(found, Path(options.to), arguments)


def _keep(found: dict[str, Any], folder: Path, arguments: list[str] | None) -> None:
    about = {"device": device_name("cuda" if torch.cuda.is_available() else "cpu"), "threads": torch.get_num_threads()}
    command = " ".join(["python -m fmfa.benchmark", *(sys.argv[1:] if arguments is None else arguments)])
    about |= {"versions": package_versions(), "git": git_state(), "command": command}
    with said_plainly(f"{folder} cannot be written to"):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "benchmark.json", about | found)
        if "curves" in found:
            with whole_file(folder / "benchmark.png") as part:
                plot_curves(found["curves"]).savefig(part, dpi=150)


def _measure_ways(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    end, rows, together = time.monotonic() + 60 * options.minutes, [], {}
    for count in (1, 4, 16) if options.device == "cuda" else (1, 2):
        together[count] = side_by_side(
            count, options.device, min(10.0, 2.0 * options.repeats), batch_size=options.batch
        )
        print(f"{count} tiny models of IRRA side by side: {together[count]:.1f} steps/s", flush=True)
    for method in METHODS:
        command = [*_command(method, options, folder), "--ways"]
        try:  # what a failed one printed is kept too
            left = max(1.0, end - time.monotonic())
            printed = subprocess.run(command, stdout=subprocess.PIPE, check=False, timeout=left).stdout
        except subprocess.TimeoutExpired as late:
            printed = late.stdout or b""
        new = [json.loads(line) for line in printed.decode().splitlines() if line.endswith("}")]
        rows += new
        print(pd.DataFrame(new).to_string(index=False) if new else f"{method}: failed, or no time was left", flush=True)
    return {"ways": rows, "side_by_side": together}


def _command(method: str, options: argparse.Namespace, folder: str) -> list[str]:
    command = [sys.executable, "-m", "fmfa.benchmark", "--method", method, "--device", options.device]
    command += ["--precision", options.precision, "--batch", str(options.batch), "--repeats", str(options.repeats)]
    return [*command, *(["--full-size", "--folder", folder] if folder else [])]


def _compare(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {"steps": {}, "rendering": {}}
    for size in ((96, 32), FULL_SIZE):
        rate = found["rendering"][f"{size[0]} x {size[1]}"] = rendering_rate(size)
        print(f"rendering {size[0]} x {size[1]}: {rate:,.0f} pictures/s on one core")
    where = f"{device_name(choose_device(options.device))}, {torch.get_num_threads()} threads"
    print(f"training steps, batch {options.batch}, {options.precision}, {where}:", flush=True)
    for method in METHODS:
        run = subprocess.run(_command(method, options, folder), stdout=subprocess.PIPE, text=True, check=True)
        values = found["steps"][method] = json.loads(run.stdout.splitlines()[-1])
        base = found["steps"][METHODS[0]]
        seconds, memory, operations = (f"{values[key] / base[key]:.2f} x" for key in ("seconds", "MiB", "MFLOP"))
        parts = ", ".join(f"{name} {values[name] / sum(values[p] for p in PARTS):.0%}" for name in PARTS)
        print(
            f"{method:5} {values['seconds']:.3f} s ({seconds} IRRA; {values['ratio']:.2f} x the released arithmetic), "
            f"+{values['MiB']:,.0f} MiB ({memory}; {values['MiB'] / values['plain_MiB']:.2f} x released), "
            f"{values['MFLOP']:,.0f} MFLOP a pair ({operations})\n      {parts}",
            flush=True,
        )
    found["evaluation"] = _compare_evaluations()
    found["curves"] = curves(options.device)
    for curve in found["curves"]:
        print(f"{curve['of']}: grows with the {curve['over']} to the power of {curve['exponent']:.2f}")
    return found


def _compare_evaluations() -> list[dict[str, float]]:
    print("evaluation of 512 dimensions on the CPU:")
    found = []
    for sizes in EVALUATIONS:
        for sorts in (True, False) if sizes == EVALUATIONS[0] else (False,):
            with multiprocessing.get_context("spawn").Pool(1) as pool:  # a fresh process, for its memory
                values = pool.apply(evaluation, sizes, {"sorts": sorts})
            found.append(values)
            per_query = 1e3 * values["seconds"] / values["queries"]
            against = {name: found[0][name] / values[name] for name in ("seconds", "MiB")}
            compared = f", {against['seconds']:.1f} times as fast and 1/{against['MiB']:.0f} of the memory"
            print(
                f"{sizes[0]:,} x {sizes[1]:,}{', sorting everything' * sorts}: {values['seconds']:.1f} s "
                f"({per_query:.2f} ms a query), +{values['MiB']:,.0f} MiB{compared * (len(found) == 2)}",
                flush=True,
            )
    return found


if __name__ == "__main__":
    main()
