"""The batches of a training run: a data set's training captions, read as the configuration says."""

from collections.abc import Iterable

import numpy as np
import pandas as pd
from torch import Tensor
from torch.utils.data import DataLoader

from fmfa.data.annotations import Dataset
from fmfa.data.images import ImageTransform, fmfa_evaluation, fmfa_training, ivt_evaluation, ivt_training
from fmfa.data.pairs import PairDataset, draw_share, make_loader, shuffle_pairs
from fmfa.data.part_maps import PartMaps
from fmfa.data.sampling import EpochBatches, IdentityBatches, RandomBatches
from fmfa.text.bytepair import Tokenizer
from fmfa.text.levels import LEVEL_FORMS, LevelReader
from fmfa.training.config import TrainConfig


class TableBatches:
    """Batches of the split "train" of a data set, for `fmfa.training.fit.fit`."""

    def __init__(
        self,
        config: TrainConfig,
        dataset: Dataset,
        tokenizer: Tokenizer,
        *,
        masked: bool,
        parts: bool = False,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        """The share of process `rank` of `processes`.

        Args:
            config: resolved; its image size, sampling, augmentation, masking and text levels are used.
            dataset: what is trained on.
            tokenizer: of the captions.
            masked: whether the model reads masked captions.
            parts: whether the model reads true part maps.
            rank, processes: which part of every batch is read.

        Raises:
            AnnotationError: no split "train", or true phrases or parts are asked of data without truth.
            ConfigError: a batch size that does not fit the data or the number of processes.
            ImageError: a picture cannot be read.
        """
        self.table = training_table(config, dataset)
        self.batches = _sampler(config, self.table["label"].to_numpy(), rank, processes)
        self.pairs = PairDataset(
            self.table,
            dataset.images,
            tokenizer,
            training_transform(config),
            seed=config.seed,
            flip="off" if config.augmentation == "none" else config.flip,
            mask_probability=config.mask_rate if masked else 0.0,
            levels=level_reader(config),
            parts=PartMaps(self.table, dataset.require_truth(), tokenizer) if parts else None,
            cache=config.cache,
        )
        self.loader: DataLoader = make_loader(self.pairs, self.batches, workers=config.workers)

    def count(self, epoch: int) -> int:
        """Batches of an epoch."""
        self.batches.set_epoch(epoch)
        return len(self.batches)

    def read(self, epoch: int, start: int) -> Iterable[dict[str, Tensor]]:
        """This rank's part of the epoch's batches from number `start` on."""
        self.pairs.set_epoch(epoch)
        self.batches.set_epoch(epoch, start)
        return self.loader

    def describe(self, rows: Tensor) -> list[str]:
        """Picture and caption of each row."""
        picked = self.table.iloc[rows.tolist()]
        return [f"{image} ({caption!r})" for image, caption in zip(picked["image"], picked["caption"])]


def training_table(config: TrainConfig, dataset: Dataset) -> pd.DataFrame:
    """The training captions as a configuration reads them: with true phrases as `spans`, shuffled, or some dropped.

    Raises:
        AnnotationError: no split "train", or `spans` of data without truth.
    """
    table = dataset.split("train")
    if config.text_levels == "spans":
        captions = dataset.require_truth().of_captions("train", table)
        table = table.assign(spans=[[(p["start"], p["end"]) for p in phrases] for phrases in captions])
    if config.pairs == "true":
        return table
    wrong = draw_share(len(table), config.wrong_share, config.seed)
    if config.pairs == "shuffled":
        return shuffle_pairs(table, wrong, config.seed)
    return table.drop(wrong).reset_index(drop=True)


def training_transform(config: TrainConfig) -> ImageTransform:
    """The training pictures' transform: the system's own augmentation, or only resizing and normalising."""
    size = (config.image_height, config.image_width)
    if config.method == "ivt":
        return ivt_training(size) if config.augmentation == "full" else ivt_evaluation(size)
    return fmfa_training(size) if config.augmentation == "full" else fmfa_evaluation(size)


def level_reader(config: TrainConfig) -> LevelReader | None:
    """IVT's multi-level alignment as `PairDataset` calls it; None when it is off.

    "released" takes the attribute phrases in the column `att` on CUHK-PEDES and clauses elsewhere;
    "spans" takes the true phrases, character spans in the column `spans`.
    """
    if config.text_levels == "off":
        return None
    return LevelReader("true_spans" if config.text_levels == "spans" else LEVEL_FORMS.get(config.dataset, "clauses"))


def describe_levels(config: TrainConfig, dataset: Dataset) -> str:
    """A sentence: the text levels of a resolved configuration, and how many training texts are the whole caption."""
    reader = level_reader(config)
    if reader is None:
        return "text levels: the whole caption alone"
    table = training_table(config, dataset)
    whole = reader.fallbacks(table, np.random.default_rng(config.seed))
    return (
        f"text levels ({config.text_levels}): word, phrase and sentence; without a piece the whole caption is used "
        f"in for {whole:,} of {2 * len(table):,} word- and phrase-level texts"
    )


def _sampler(config: TrainConfig, labels: np.ndarray, rank: int, processes: int) -> EpochBatches:
    place = {"seed": config.seed, "rank": rank, "world_size": processes}
    if config.instances:
        return IdentityBatches(labels.tolist(), config.batch_size // config.instances, config.instances, **place)
    return RandomBatches(len(labels), config.batch_size, **place)
