"""Training pairs: a caption and its picture, augmented and masked, as batches of tensors.

Everything random about a sample derives from (seed, epoch, row), so that batches do not depend on the
number of worker processes and training can resume anywhere.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from filelock import FileLock
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2.functional import horizontal_flip

from fmfa.data.images import ImageTransform, resolve_image
from fmfa.data.part_maps import PartMaps
from fmfa.data.sampling import EpochBatches
from fmfa.errors import ConfigError
from fmfa.files import flush, said_plainly
from fmfa.progress import progress_bar
from fmfa.text.bytepair import Tokenizer
from fmfa.text.levels import swap_sides

CACHE_LIMIT = 2**30  # bytes of resized pictures kept in memory
READ_TOGETHER = 256  # pictures that are read before the first of them is written
PADDED_WITH = {"masked_labels": 0, "token_parts": -1}  # and ids with the tokenizer's own padding
Levels = Callable[[str, Mapping[str, Any], np.random.Generator], Sequence[Any]]
OF_THE_PICTURE = ("image", "identity", "label", "split", "record", "held_out")
KEPT, RANDOM = 0.1, 0.1  # shares of the chosen tokens; the rest become the mask token


class PairDataset(Dataset):
    """The training pairs of a table, one sample per row.

    A sample is a dict of tensors with a leading axis of S texts: S = 1, or 3 with `levels`. `collate`
    joins samples into a batch.
    """

    def __init__(
        self,
        table: pd.DataFrame,
        images: str | Path,
        tokenizer: Tokenizer,
        transform: ImageTransform,
        *,
        seed: int,
        flip: str = "mirror",
        mask_probability: float = 0.15,
        levels: Levels | None = None,
        parts: PartMaps | None = None,
        cache: str | Path = "",
    ) -> None:
        """Pairs of `table`, whose columns `image`, `caption` and `label` are read.

        Up to 1 GiB of resized pictures are kept in memory, or any number in a memory-mapped file in `cache`.

        Args:
            table: one row per caption, as `Dataset.split` gives it.
            images: folder that the column `image` is relative to.
            tokenizer: of the captions.
            transform: of the pictures.
            seed: of every draw.
            flip: "mirror" mirrors half of the pictures; "swap" also exchanges the words left and right
                in the captions of those; "off" mirrors none.
            mask_probability: share of tokens chosen by `mask_tokens`; 0 leaves masking out.
            levels: multi-level alignment's hook: (caption, row of the table, generator) -> texts, the
                first three of which are the word, phrase and sentence level. Each is paired with an
                augmentation of its own.
            parts: true part maps of the rows, for oracles; not together with `levels`.
            cache: folder for the resized pictures; empty: none. The file is made on first use, goes on where a kill
                stopped it, and belongs to these pictures' paths, sizes and times of change and to this resize.

        Raises:
            ConfigError: `parts` with `levels`, or a `cache` that cannot be written.
            ImageError: an unreadable picture: here, or on access where the pictures are not kept in memory.
        """
        if levels and parts:
            raise ConfigError(
                "part maps belong to whole captions, and text levels cut them: train this oracle without text levels"
            )
        self.tokenizer, self.transform, self.seed = tokenizer, transform, seed
        self.flip, self.mask_probability, self.levels, self.parts = flip, mask_probability, levels, parts
        self._captions = table["caption"].tolist()
        self._labels = torch.from_numpy(table["label"].to_numpy(np.int64, copy=True))
        self._records = table.to_dict("records") if levels else []
        self._picture_of_row, names = pd.factorize(table["image"])
        self._paths = [resolve_image(images, name) for name in names]
        size = 3 * transform.size[0] * transform.size[1] * len(self._paths)
        self._pictures = self._read_once(Path(cache)) if cache else self._read_all() if size <= CACHE_LIMIT else None
        self._known = {} if levels else self._numbered_texts()
        self._known_ids = tokenizer(list(self._known))
        # Shared memory, so that worker processes that live on see the next epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self._captions)

    def set_epoch(self, epoch: int) -> None:
        """Draw the augmentations and masks of this epoch from the next sample on."""
        self._epoch.fill_(epoch)

    def __getitem__(self, row: int) -> dict[str, Tensor | list[Tensor]]:
        """The sample of a row; the same for the same (seed, epoch, row), whatever was drawn before."""
        source = np.random.SeedSequence([self.seed, int(self._epoch), row])
        pixel_seed, choice_seed, text_seed = (int(word) for word in source.generate_state(3, np.uint64))
        choices = torch.Generator().manual_seed(choice_seed)
        texts = self._texts(row, text_seed)
        flipped = [False] * len(texts)
        if self.flip != "off":
            flipped = (torch.rand(len(texts), generator=choices) < 0.5).tolist()
        if self.flip == "swap":
            texts = [swap_sides(text) if mirrored else text for text, mirrored in zip(texts, flipped)]
        ids = [self._encode(text) for text in texts]
        sample: dict[str, Tensor | list[Tensor]] = {"caption_ids": ids}
        pictures = [self._picture(row)]
        if self.parts is not None:
            swapped = flipped[0] and self.flip == "swap"
            sample["token_parts"] = [self.parts.tokens(row, len(ids[0]), swapped=swapped)]
            pictures.append(self.parts.picture(row, self.transform.size))
        augmented = self._augment(pictures, flipped, pixel_seed)
        sample["images"] = augmented[0]
        if self.parts is not None:  # 0 is what the picture does not show
            sample["part_maps"] = augmented[1].squeeze(-3).to(torch.int8) - 1
        if self.mask_probability:
            masked = [mask_tokens(text, self.tokenizer, choices, self.mask_probability) for text in ids]
            sample["masked_ids"], sample["masked_labels"] = map(list, zip(*masked))
        sample["labels"] = self._labels[row].expand(len(texts))
        sample["rows"] = torch.tensor(row).expand(len(texts))
        return sample

    def collate(self, samples: Sequence[dict[str, Tensor | list[Tensor]]]) -> dict[str, Tensor]:
        """Join samples to a batch.

        Returns:
            `images` float32 [SB, 3, H, W]; `caption_ids` and, with masking, `masked_ids`,
            `masked_labels` int64 [SB, L] and `masked_positions` [SB, K]; `labels`, `rows` int64 [SB]; with
            part maps `part_maps` int8 [B, H, W] (the part that each pixel shows) and `token_parts` int64 [B, L]
            (the part that each token speaks of), -1 for none; and `attention_mask` int64
            [SB, L] where the tokenizer pads to the longest caption. The first B rows hold every
            sample's first text (word level), the next B the second, and so on.
        """
        batch = {}
        for key in samples[0]:
            by_text = [value for values in zip(*(sample[key] for sample in samples)) for value in values]
            if key.endswith("_ids") or key in PADDED_WITH:
                fill = PADDED_WITH.get(key, self.tokenizer.pad_id)
                batch[key] = pad_sequence(by_text, batch_first=True, padding_value=fill)
            else:
                batch[key] = torch.stack(by_text)
        if "masked_labels" in batch:
            batch["masked_positions"] = masked_positions(batch["masked_labels"])
        if hasattr(self.tokenizer, "attention_mask"):
            mask = self.tokenizer.attention_mask(batch["caption_ids"])
            longest = int(mask.sum(1).max())
            for key in batch.keys() & {"caption_ids", "masked_ids", *PADDED_WITH}:
                batch[key] = batch[key][:, :longest]
            batch["attention_mask"] = mask[:, :longest]
        return batch

    def _texts(self, row: int, seed: int) -> list[str]:
        caption = self._captions[row]
        if self.levels is None:
            return [caption]
        return list(self.levels(caption, self._records[row], np.random.default_rng(seed)))[:3]

    def _encode(self, text: str) -> Tensor:
        number = self._known.get(text)
        return self.tokenizer([text])[0] if number is None else self._known_ids[number]

    def _numbered_texts(self) -> dict[str, int]:
        texts = set(self._captions)
        if self.flip == "swap":
            texts |= {swap_sides(caption) for caption in texts}
        return {text: number for number, text in enumerate(sorted(texts))}

    def _picture(self, row: int) -> Tensor:
        picture = self._picture_of_row[row]
        if self._pictures is not None:
            return self._pictures[picture]
        return self.transform.read(self._paths[picture])

    def _augment(self, pictures: Sequence[Tensor], flipped: Sequence[bool], seed: int) -> list[Tensor]:
        """A picture, and perhaps its part map, once per text with the same draws: [S, 3, H, W] and [S, 1, H, W]."""
        # torchvision's transforms draw from torch's default generator: lend it to this sample.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            copies = [self.transform.finish(*(map(horizontal_flip, pictures) if f else pictures)) for f in flipped]
        by_kind = zip(*copies) if len(pictures) > 1 else [copies]
        return [torch.stack([copy.as_subclass(Tensor) for copy in kind]) for kind in by_kind]

    def _read_all(self) -> Tensor:
        return torch.stack(list(self._read(self._paths)))

    def _read(self, paths: Sequence[Path]) -> Iterator[Tensor]:
        with ThreadPoolExecutor() as pool:
            for start in range(0, len(paths), READ_TOGETHER):
                yield from pool.map(self.transform.read, paths[start : start + READ_TOGETHER])

    def _read_once(self, folder: Path) -> Tensor:
        """The resized pictures, uint8 [N, 3, H, W], mapped from their file in `folder`."""
        shape, paths = (len(self._paths), 3, *self.transform.size), self._paths
        states = [(os.fspath(path), *_state(path)) for path in paths]
        name = hashlib.sha256(repr((states, shape, self.transform.interpolation)).encode()).hexdigest()[:16]
        path = folder / f"pictures-{name}.uint8"
        if not path.is_file():
            with said_plainly(f"{folder} cannot hold the resized pictures"):
                folder.mkdir(parents=True, exist_ok=True)
                with FileLock(folder / ".lock"):  # another process of this training may be at work: wait for it
                    if not path.is_file():
                        self._write_all(path, int(np.prod(shape[1:])))
        return torch.from_numpy(np.memmap(path, mode="c", dtype=np.uint8, shape=shape))

    def _write_all(self, path: Path, size: int) -> None:
        partial = path.with_suffix(".partial")
        partial.touch()
        done = partial.stat().st_size // size
        with (
            open(partial, "r+b") as file,
            progress_bar(len(self._paths), "resizing pictures", "pictures", initial=done) as bar,
        ):
            file.truncate(done * size)
            file.seek(done * size)
            for picture in self._read(self._paths[done:]):
                file.write(picture.numpy().tobytes())
                bar.update()
        flush(partial)
        os.replace(partial, path)


def _state(path: Path) -> tuple[int, int]:
    """Size and time of change; zeros for a file that is not there, which reading will tell."""
    try:
        state = path.stat()
    except OSError:
        return 0, 0
    return state.st_size, state.st_mtime_ns


def make_loader(dataset: PairDataset, batches: EpochBatches, *, workers: int = 0) -> DataLoader:
    """A loader of the dataset's batches that draws nothing from torch's default generator.

    The batches are the same for any number of worker processes, which live on between epochs. Set the epoch of
    `dataset` and `batches` before each pass.
    """
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=dataset.collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        generator=torch.Generator(),
    )


def draw_share(count: int, share: float, seed: int) -> np.ndarray:
    """Draw a share of `count` rows at random: int64, ascending; all of them for a share of 1."""
    drawn = np.random.default_rng([seed, count]).permutation(count)[: round(share * count)]
    return np.sort(drawn)


def shuffle_pairs(table: pd.DataFrame, rows: np.ndarray, seed: int) -> pd.DataFrame:
    """Give captions to pictures of other people, by one random permutation.

    What belongs to a caption (its tokens, phrases and attributes) moves with it; pictures keep their identity. A model
    trained on such pairs alone can learn nothing that holds, and must end no better than it started. Some of them among
    right ones are noisy correspondence (RDE, Qin et al., CVPR 2024).

    Args:
        table: one row per caption, as `Dataset.split` gives it.
        rows: positions in `table` whose captions are exchanged; the others stay.
        seed: of the permutation.

    Raises:
        ConfigError: more than half of these captions belong to one identity.
    """
    identity = table["identity"].to_numpy()[rows]
    most = int(np.unique(identity, return_counts=True)[1].max(initial=0))
    if 2 * most > len(rows):
        raise ConfigError(
            f"{most} of {len(rows)} training captions to shuffle belong to one identity; shuffled pairs need pictures "
            "of other people for all of them: train on more identities"
        )
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(rows))
    for row in np.flatnonzero(identity[order] == identity):
        if identity[order[row]] == identity[row]:
            fits = (identity[order] != identity[row]) & (identity != identity[order[row]])
            other = generator.choice(np.flatnonzero(fits))
            order[[row, other]] = order[[other, row]]
    source = np.arange(len(table))
    source[rows] = rows[order]
    moved = [column for column in table if column not in OF_THE_PICTURE]
    return table.assign(**{column: table[column].to_numpy()[source] for column in moved})


def mask_tokens(
    ids: Tensor, tokenizer: Tokenizer, generator: torch.Generator, probability: float = 0.15
) -> tuple[Tensor, Tensor]:
    """Mask caption tokens for implicit relation reasoning (IRRA, Jiang and Ye 2023; FMFA).

    Each ordinary token is chosen with `probability`. Of the chosen ones 80 % become the mask, 10 % a
    random ordinary token, 10 % stay. Where none was chosen, position 1 is, unless it holds no ordinary
    token (the end of an empty caption). Start, end and padding are never chosen, nor is the token with
    id 0 (CLIP's "!"), which the labels could not tell from "not masked".

    Args:
        ids: int64 [..., L], rows of a byte-pair tokenizer; not changed.
        tokenizer: whose ids they are; ordinary ids are [1, mask_id).
        generator: the only source of the draws.
        probability: share of ordinary tokens chosen.

    Returns:
        The masked ids, and the labels: the original id where a token was chosen, else 0. Both as `ids`.
    """
    ordinary = (ids > 0) & (ids < tokenizer.mask_id)
    targets = ordinary & (torch.rand(ids.shape, generator=generator) < probability)
    targets[..., 1] |= ordinary[..., 1] & ~targets.any(-1)
    fate = torch.rand(ids.shape, generator=generator)
    random = torch.randint(1, tokenizer.mask_id, ids.shape, generator=generator)
    replacement = torch.where(fate < RANDOM, random, tokenizer.mask_id)
    replaced = targets & (fate < 1 - KEPT)
    return torch.where(replaced, replacement, ids), torch.where(targets, ids, 0)


def masked_positions(labels: Tensor) -> Tensor:
    """Where the labels [B, L] of masked tokens are not 0, by row: int64 [B, K], with others behind in shorter rows.

    K is the largest number of a row, rounded up to a multiple of 4 (at most L), so that few shapes occur.
    """
    targets = labels != 0
    most = max(int(targets.sum(dim=1).max()), 1)
    return targets.int().argsort(dim=1, descending=True, stable=True)[:, : -(-most // 4) * 4]
