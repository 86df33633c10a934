"""Embeddings of pictures and captions by any model of the interface, in float32 and in batches."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from fmfa.data.transforms import ImageTransform
from fmfa.errors import ImageError
from fmfa.progress import progress_bar
from fmfa.text.tokens import Tokenizer

BATCH_SIZE = 256


def encode_images(
    model: nn.Module,
    paths: Sequence[str | Path],
    transform: ImageTransform,
    *,
    faults: dict[str | Path, str] | None = None,
    batch_size: int = BATCH_SIZE,
    progress: bool = True,
) -> Tensor:
    """Embeddings of pictures, read from disk by a few threads while the model works.

    Args:
        model: has `encode_image`; stays on its device and is put back into its mode afterwards.
        paths: files to read.
        transform: the evaluation transform that belongs to the model.
        faults: takes, by path, why a picture cannot be read; such pictures have no row in the result.
        batch_size: pictures at a time.
        progress: show a progress bar.

    Returns:
        float32 [N, D] on the CPU, not normalised, in the order of `paths`.

    Raises:
        ImageError: a picture cannot be read, and no `faults` were given; the message names it.
    """

    def read(path: str | Path) -> Tensor | None:
        try:
            return transform.read(path)
        except ImageError as error:
            if faults is None:
                raise
            faults[path] = str(error)
            return None

    def encode(pictures: Tensor) -> Tensor:
        return model.encode_image(transform.finish(pictures)).embedding

    batches = _read_ahead(read, [paths[i : i + batch_size] for i in range(0, len(paths), batch_size)])
    return _encode(model, encode, batches, len(paths), "pictures", progress)


def encode_captions(
    model: nn.Module,
    captions: Sequence[str],
    tokenizer: Tokenizer,
    *,
    batch_size: int = BATCH_SIZE,
    progress: bool = True,
) -> Tensor:
    """Embeddings of captions: float32 [N, D] on the CPU, not normalised, in the order of `captions`.

    Args:
        model: has `encode_text`; stays on its device and is put back into its mode afterwards.
        captions: any strings; the tokenizer cuts over-long ones.
        tokenizer: the one that belongs to the model.
        batch_size: captions at a time.
        progress: show a progress bar.
    """

    def encode(ids: Tensor) -> Tensor:
        return model.encode_text(ids).embedding

    batches = (tokenizer(captions[i : i + batch_size]) for i in range(0, len(captions), batch_size))
    return _encode(model, encode, batches, len(captions), "captions", progress)


@torch.no_grad()
def _encode(
    model: nn.Module,
    encode: Callable[[Tensor], Tensor],
    batches: Iterator[Tensor],
    total: int,
    unit: str,
    progress: bool,
) -> Tensor:
    device = next(model.parameters()).device
    parts = []
    bar = progress_bar(total, f"encoding {unit}", unit, shown=progress)
    with bar, evaluating(model), torch.autocast(device.type, enabled=False):
        for batch in batches:
            parts.append(encode(batch.to(device)).float().cpu())
            bar.update(len(batch))
    return torch.cat(parts) if parts else torch.empty(0, 0)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module of a model into evaluation mode, and back into its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _read_ahead(
    read: Callable[[str | Path], Tensor | None], batches: Sequence[Sequence[str | Path]]
) -> Iterator[Tensor]:
    """uint8 [B, 3, H, W], with the next batch being read while the caller uses this one."""
    with ThreadPoolExecutor() as pool:
        coming = pool.map(read, batches[0]) if batches else ()
        for following in [*batches[1:], ()]:
            present = [picture for picture in coming if picture is not None]
            coming = pool.map(read, following)
            if present:
                yield torch.stack(present)
