"""What a model costs: parameters, operations of a training, time per picture and caption, memory, time to rank."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import psutil
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fmfa.data.images import ImageTransform, resolve_image
from fmfa.evaluation.evaluate import encode_captions, encode_images, gallery_of, top_matches
from fmfa.models.outputs import Retriever
from fmfa.records import device_name
from fmfa.text.bytepair import Tokenizer

TRAINING_HEADS = ("irr", "classifier")
SAMPLING_SECONDS = 0.002


def inference_cost(
    model: Retriever,
    tokenizer: Tokenizer,
    transform: ImageTransform,
    rows: pd.DataFrame,
    images: str | Path,
    *,
    batch_size: int = 64,
    repeats: int = 5,
) -> pd.DataFrame:
    """Measure a model on the first pictures and captions of a split.

    Encoding is timed on one batch after a warm-up run, from pictures that are decoded already and from strings; the
    clock stops when the embeddings are on the CPU. Ranking is timed on features of the size of the whole split, drawn
    at random, since its time does not depend on their values.

    Args:
        model: any model of the interface, on its device; it is not changed.
        tokenizer: the model's.
        transform: the model's evaluation transform.
        rows: the split, one row per caption.
        images: folder that the column `image` is relative to.
        batch_size: pictures and captions at a time.
        repeats: timed runs, of which the median counts.

    Returns:
        One row per quantity: `quantity`, `value`, `unit`, `setting` (device, threads, sizes).

    Raises:
        AnnotationError, ImageError: see `fmfa.evaluation.evaluate.evaluate`.
    """
    gallery = gallery_of(rows)
    device = next(model.parameters()).device
    where = f"{device_name(device)}, {torch.get_num_threads()} threads"
    paths = [resolve_image(images, name) for name in gallery["image"][:batch_size]]
    captions = rows["caption"].tolist()[:batch_size]
    pictures: dict[Path, Tensor] = {}
    reading = _median(lambda: pictures.update({path: transform.read(path) for path in paths}), 1)
    decoded: Any = SimpleNamespace(read=pictures.__getitem__, finish=transform.finish)
    quiet: dict[str, Any] = {"batch_size": batch_size, "progress": False}
    with _peak_memory(device) as peak:
        features = encode_images(model, paths, decoded, **quiet)
        encode_captions(model, captions, tokenizer, **quiet)
        picture = _median(lambda: encode_images(model, paths, decoded, **quiet), repeats)
        caption = _median(lambda: encode_captions(model, captions, tokenizer, **quiet), repeats)
    generator = torch.Generator().manual_seed(0)
    stored = torch.randn(len(gallery), features.shape[1], generator=generator)
    query = torch.randn(features.shape[1], generator=generator)
    ranking = _median(lambda: top_matches(stored @ query), 10 * repeats)
    total = sum(p.numel() for p in model.parameters())
    heads = [getattr(model, name, None) for name in TRAINING_HEADS]
    used = total - sum(p.numel() for head in heads if head is not None for p in head.parameters())
    batch = f"batch of {len(paths)}, {transform.size[0]} x {transform.size[1]} pixels, {where}"
    memory = (
        "tensors on the GPU" if device.type == "cuda" else "resident memory of the whole process, libraries included,"
    )
    ranked = f"{len(gallery):,} pictures of {features.shape[1]} numbers, CPU, {torch.get_num_threads()} threads"
    return pd.DataFrame(
        [
            ("parameters", total / 1e6, "million", "all, heads for training included"),
            ("parameters for retrieval", used / 1e6, "million", "both encoders, without heads for training"),
            ("encode a picture", 1e3 * picture / len(paths), "ms", batch),
            ("encode a caption", 1e3 * caption / len(captions), "ms", f"batch of {len(captions)}, {where}"),
            ("read a picture from disk", 1e3 * reading / len(paths), "ms", "decode and resize, 1 thread"),
            ("rank the gallery for a query", 1e3 * ranking, "ms", ranked),
            ("peak memory", peak["bytes"] / 2**20, "MiB", f"{memory} while encoding such batches"),
        ],
        columns=["quantity", "value", "unit", "setting"],
    )


def _median(run: Callable[[], object], repeats: int) -> float:
    """Median wall-clock seconds of `repeats` runs."""
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begun)
    return float(np.median(seconds))


@contextmanager
def _peak_memory(device: torch.device) -> Iterator[dict[str, int]]:
    """Yield a dict whose "bytes" is the peak of the body once it is done: of tensors on a GPU, or of the process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        peak = {"bytes": 0}
        yield peak
        peak["bytes"] = torch.cuda.max_memory_allocated(device)
        return
    process, over = psutil.Process(), threading.Event()
    peak = {"bytes": process.memory_info().rss}

    def watch() -> None:
        while not over.wait(SAMPLING_SECONDS):
            peak["bytes"] = max(peak["bytes"], process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        over.set()
        watcher.join()


def encoding_operations(
    model: Retriever, tokenizer: Tokenizer, transform: ImageTransform, pictures: Sequence[Path], captions: Sequence[str]
) -> tuple[int, int]:
    """Floating-point operations to encode a caption and a picture, averaged over batches; see `training_flops`."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # which the counter does not know
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            encode_captions(model, captions, tokenizer, progress=False)
            caption = counter.get_total_flops()
            encode_images(model, pictures, transform, progress=False)
            picture = counter.get_total_flops() - caption
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return round(caption / len(captions)), round(picture / len(pictures))


def training_flops(model: nn.Module, batch: Mapping[str, Tensor]) -> int:
    """Floating-point operations per pair of one forward and backward pass on a batch.

    Matrix products and convolutions are counted, a multiplication and an addition as two. For every model whose forward
    takes a batch. Gradients are cleared; the default generators are left as they were, the model's own are not.
    """
    # The plain attention consists of matrix products, which the counter knows on every device.
    with torch.random.fork_rng(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        sum(model(batch).losses.values()).backward()
    model.zero_grad(set_to_none=True)
    return round(counter.get_total_flops() / len(batch["images"]))


def training_budget(model: nn.Module, batch: Mapping[str, Tensor], kept: str = "") -> dict[str, int]:
    """What training a model costs.

    Args:
        model: any model of the interface, in training mode.
        batch: what operations are counted on.
        kept: beginning of the names of the parameters that retrieval needs; empty is all.

    Returns:
        `parameters` (that are trained), `retrieval_parameters` (of these, kept after training) and
        `training_flops_a_pair`.
    """
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    return {
        "parameters": sum(sizes.values()),
        "retrieval_parameters": sum(size for name, size in sizes.items() if name.startswith(kept)),
        "training_flops_a_pair": training_flops(model, batch),
    }
