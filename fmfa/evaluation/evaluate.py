"""Retrieval quality of a model on a split, in both directions, and searches by a sentence."""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from fmfa.data.images import ImageTransform, picture_suffixes, resolve_image
from fmfa.errors import AnnotationError, ConfigError, ImageError
from fmfa.evaluation.statistics import Interval, bootstrap_interval
from fmfa.metrics import CHUNK_ELEMENTS, PER_QUERY, RankMetrics, chance_metrics, feature_metrics, rank_metrics
from fmfa.models.outputs import Retriever
from fmfa.progress import progress_bar
from fmfa.text.bytepair import Tokenizer

TEXT_TO_IMAGE, IMAGE_TO_TEXT = "text to image", "image to text"
NO_PICTURES = ("__MACOSX", "@eaDir")
"""Folders that archives of a Mac and network drives put beside the pictures."""
BATCH_SIZE = 256


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Features of a split and everything that follows from them.

    Every caption is a query against every different image once, and every image a query against every
    caption; a hit is the same identity. Features are compared by their cosine.

    Attributes:
        rows: the split's table, one row per caption, index 0..Q-1.
        gallery: table of the G different images in order of appearance: `image`, `identity`.
        text_features: float32 [Q, D], not normalised.
        image_features: float32 [G, D], not normalised.
        seed: of the bootstrap.
        reranked: scores of a second stage, one line per pair: `query` and `item` (positions in `rows` and `gallery`)
            and `score`. The items listed for a query come before all others, the highest score first; all others keep
            the order of their cosines. There is no image to text then.
    """

    rows: pd.DataFrame
    gallery: pd.DataFrame
    text_features: Tensor
    image_features: Tensor
    seed: int = 0
    reranked: pd.DataFrame | None = None

    @cached_property
    def metrics(self) -> dict[str, RankMetrics]:
        """Metrics by direction, "text to image" and "image to text"."""
        text, image = self._identities
        if self.reranked is not None:
            parts = [rank_metrics(scores, text[queries], image) for queries, scores in self.similarities()]
            arrays: dict[str, Any] = {
                name: np.concatenate([getattr(part, name) for part in parts]) for name in PER_QUERY
            }
            return {TEXT_TO_IMAGE: replace(parts[0], **arrays)}
        return {
            TEXT_TO_IMAGE: feature_metrics(self.text_features, self.image_features, text, image),
            IMAGE_TO_TEXT: feature_metrics(self.image_features, self.text_features, image, text),
        }

    @cached_property
    def chance(self) -> dict[str, dict[str, float]]:
        """Expected metrics (fractions) of a random ranking, by direction and metric."""
        text, image = self._identities
        return {TEXT_TO_IMAGE: chance_metrics(text, image), IMAGE_TO_TEXT: chance_metrics(image, text)}

    @cached_property
    def intervals(self) -> dict[str, dict[str, Interval]]:
        """Means with 95 % intervals over identities (fractions), by direction and metric."""
        generator = np.random.default_rng(self.seed)
        return {
            direction: {
                name: bootstrap_interval(values, metrics.identity, generator)
                for name, values in metrics.per_query().items()
            }
            for direction, metrics in self.metrics.items()
        }

    def table(self) -> pd.DataFrame:
        """All metrics in percent, a row each, with their interval, chance level and numbers of items.

        Columns: direction, metric, value, low, high, chance, queries, gallery.
        """
        return pd.DataFrame(
            {
                "direction": direction,
                "metric": name,
                "value": 100 * interval.estimate,
                "low": 100 * interval.low,
                "high": 100 * interval.high,
                "chance": 100 * self.chance[direction][name],
                "queries": len(metrics.relevant) - metrics.unanswerable,
                "gallery": metrics.gallery_size,
            }
            for direction, metrics in self.metrics.items()
            for name, interval in self.intervals[direction].items()
        )

    def per_query(self, direction: str = TEXT_TO_IMAGE) -> pd.DataFrame:
        """The split's table (or the gallery's) with each query's `first_rank` and metrics as columns."""
        metrics = self.metrics[direction]
        queries = self.rows if direction == TEXT_TO_IMAGE else self.gallery
        return queries.assign(first_rank=metrics.first_rank, **metrics.per_query())

    def top_matches(self, query: int, k: int = 10) -> pd.DataFrame:
        """The k best images for a caption, best first: `image`, `identity`, `similarity`, `hit`.

        Of equally similar images those of other people come first, as `rank_metrics` counts ties against the model:
        the first hit is at the caption's `first_rank`.

        Args:
            query: row position of the caption.
            k: number of images, or fewer if the gallery is smaller.
        """
        table = self.gallery.assign(similarity=self.similarity([query])[0].numpy())
        table["hit"] = table["identity"] == self.rows["identity"].iloc[query]
        return table.sort_values(["similarity", "hit"], ascending=[False, True], kind="stable")[:k]

    def similarity(self, queries: Sequence[int] | np.ndarray) -> Tensor:
        """Similarity of some captions, by position, to every image: float32 [Q, G], ranked as `metrics` are.

        It is the cosine; images that a second stage listed have 2 plus the place of their score from below.
        """
        scores = _cosine(self.text_features[queries], self.image_features)
        if self.reranked is not None:
            listed = self.reranked[self.reranked["query"].isin(queries)]
            rows = pd.Index(queries).get_indexer(listed["query"])
            levels = listed.groupby("query")["score"].rank("dense").to_numpy(np.float32)
            scores[rows, listed["item"].to_numpy(copy=True)] = torch.from_numpy(2 + levels)
        return scores

    def similarities(self) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Positions of all queries in order with their `similarity`, as many at a time as fit into memory."""
        parts = -(-len(self.rows) * len(self.gallery) // CHUNK_ELEMENTS)
        for queries in np.array_split(np.arange(len(self.rows)), parts):
            yield queries, self.similarity(queries)

    @property
    def _identities(self) -> tuple[np.ndarray, np.ndarray]:
        return self.rows["identity"].to_numpy(), self.gallery["identity"].to_numpy()


def evaluate(
    model: Retriever,
    rows: pd.DataFrame,
    images: str | Path,
    tokenizer: Tokenizer,
    transform: ImageTransform,
    *,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    progress: bool = True,
) -> Evaluation:
    """Encode a split with a model; metrics and intervals are computed when they are first asked for.

    Args:
        model: on any device.
        rows: one row per caption, as `Dataset.split` gives it; `image`, `identity` and `caption` are used.
        images: folder that the column `image` is relative to.
        tokenizer: the model's.
        transform: the model's evaluation transform, which fixes the picture size.
        batch_size: pictures or captions at a time.
        seed: of the bootstrap.
        progress: show progress bars.

    Raises:
        AnnotationError: no rows, or an image that belongs to two identities.
        ImageError: a picture cannot be read.
    """
    gallery = gallery_of(rows)
    paths = [resolve_image(images, name) for name in gallery["image"]]
    captions = rows["caption"].tolist()
    return Evaluation(
        rows=rows.reset_index(drop=True),
        gallery=gallery,
        text_features=encode_captions(model, captions, tokenizer, batch_size=batch_size, progress=progress),
        image_features=encode_images(model, paths, transform, batch_size=batch_size, progress=progress),
        seed=seed,
    )


def gallery_of(rows: pd.DataFrame) -> pd.DataFrame:
    """The different images of a split in order of appearance, with their identities; index 0..G-1.

    Raises:
        AnnotationError: no rows, or an image that belongs to two identities.
    """
    if rows.empty:
        raise AnnotationError("the split has no captions: there is nothing to evaluate")
    pairs = rows[["image", "identity"]].drop_duplicates()
    if (twice := pairs["image"].duplicated()).any():
        name = pairs["image"][twice].iloc[0]
        found = sorted(pairs["identity"][pairs["image"] == name])
        raise AnnotationError(f"image {name!r} belongs to the identities {found}; expected one")
    return pairs.reset_index(drop=True)


def top_matches(similarity: Tensor, k: int = 10) -> Tensor:
    """Positions of the k highest of `similarity` [G], best first, int64; the first of equals comes first."""
    return similarity.argsort(descending=True, stable=True)[:k]


def encode_sentence(model: Retriever, sentence: str, tokenizer: Tokenizer) -> Tensor:
    """Embedding of a sentence to search for: float32 [D], not normalised; a warning tells if its end is not read.

    Raises:
        ConfigError: an empty sentence.
    """
    if not sentence.strip():
        raise ConfigError("the sentence to search for is empty; describe a person")
    if (needed := tokenizer.length(sentence)) > tokenizer.context_length:
        warnings.warn(
            f"the sentence needs {needed} positions and the model reads {tokenizer.context_length}: its end is not "
            "searched for; shorten it",
            stacklevel=3,
        )
    return encode_captions(model, [sentence], tokenizer, progress=False)[0]


def pictures_below(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Paths of the picture files in a folder and its subfolders, and by path why a subfolder cannot be searched.

    Links are followed, each folder once, and never to a folder that holds `folder`.
    """
    paths: list[str] = []
    faults: dict[str, str] = {}

    def note(error: OSError) -> None:
        faults[error.filename] = f"{error.filename}: {error.strerror}"

    suffixes, seen = picture_suffixes(), set(map(str, Path(os.path.realpath(folder)).parents))
    for place, folders, files in os.walk(folder, followlinks=True, onerror=note):
        real = os.path.realpath(place)
        folders[:] = [] if real in seen else sorted(f for f in folders if f[0] != "." and f not in NO_PICTURES)
        if real not in seen:
            paths += (os.path.join(place, f) for f in files if f[0] != "." and Path(f).suffix.lower() in suffixes)
        seen.add(real)
    return sorted(paths), faults


def _cosine(queries: Tensor, gallery: Tensor) -> Tensor:
    scores = F.normalize(queries.double(), dim=1) @ F.normalize(gallery.double(), dim=1).T
    return scores.float()  # rounded as in `feature_metrics`, so that ranks agree


def shuffle_captions(evaluation: Evaluation, seed: int = 0) -> Evaluation:
    """The same evaluation with the captions shuffled among the queries, without encoding anything again.

    A query keeps its identity and gets a random caption, once in a while one of its own identity: only so is R@1
    expected to be that of a random ranking. (With captions of other identities alone a perfect system would have 0.) At
    deeper ranks a good system is below a random ranking, because pictures of one person follow each other.

    Args:
        evaluation: of a split.
        seed: of the permutation.

    Returns:
        An evaluation whose R@1 is at chance, apart from the luck of the permutation; where it is above, the answer has
        another way to the system than the caption.
    """
    order = torch.randperm(len(evaluation.rows), generator=torch.Generator().manual_seed(seed))
    captions = evaluation.rows["caption"].to_numpy()[order.numpy()]
    return replace(
        evaluation,
        rows=evaluation.rows.assign(caption=captions),
        text_features=evaluation.text_features[order],
    )


def encode_images(
    model: Retriever,
    paths: Sequence[str | Path],
    transform: ImageTransform,
    *,
    faults: dict[str, str] | None = None,
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
            faults[str(path)] = str(error)
            return None

    def encode(pictures: Tensor) -> Tensor:
        return model.encode_image(transform.finish(pictures)).embedding

    batches = _read_ahead(read, [paths[i : i + batch_size] for i in range(0, len(paths), batch_size)])
    return _encode(model, encode, batches, len(paths), "pictures", progress)


def encode_captions(
    model: Retriever,
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
    model: Retriever,
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
def evaluating(model: Retriever) -> Iterator[None]:
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
