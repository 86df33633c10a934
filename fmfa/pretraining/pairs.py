"""Pairs of pre-training: SimPEDES' identity-free stream, or any image-caption list."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Subset
from torchvision.transforms.v2.functional import horizontal_flip

from fmfa.data.annotations import read_records
from fmfa.data.images import ImageTransform, resolve_image
from fmfa.errors import AnnotationError, ConfigError
from fmfa.pretraining.methods import Captions, Method
from fmfa.pretraining.span_masking import prepare_caption
from fmfa.pretraining.stream import web_pair

HELD_OUT = 512  # pairs of another stream seed, or of the end of a list, for the curve


class WebStream(Dataset):
    """The first `count` pairs of the stream of `seed`: picture uint8 [3, H, W] and alt-text."""

    def __init__(self, seed: int, size: tuple[int, int], count: int):
        self.seed, self.size, self.count = seed, size, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        image, text = web_pair(self.seed, index, self.size)
        return torch.from_numpy(image).permute(2, 0, 1), text


class PretrainingPairs(Dataset):
    """The pairs that pre-training sees, in order; one sample a position.

    Position p is pair p of the source, or, at random, pair p % len of the order of pass p // len. Everything
    random about a sample derives from (seed, position), so that training resumes anywhere.
    """

    def __init__(
        self,
        source: "Subset | WebStream",
        captions: Captions,
        finish: nn.Module,
        *,
        seed: int,
        first: int,
        count: int,
        random: bool = False,
    ) -> None:
        """Positions `first` to `first + count`.

        Args:
            source: numbered pairs, each a picture, uint8 [3, H, W], and its caption.
            captions: from a caption to ids.
            finish: of an `ImageTransform`: uint8 [3, H, W] to the network's float32.
            seed: of order, augmentation and words.
            first: first position.
            count: number of positions.
            random: a new order of the source at each pass, and half of the pictures mirrored.
        """
        self.source, self.captions, self.finish = source, captions, finish
        self.seed, self.first, self.count, self.random = seed, first, count, random
        self._order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        """Number of positions."""
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """The sample: `images` [3, H, W], what `captions` gives, each [L], and `labels` [].

        The label is the pair's number in the source. Raises ImageError for an unreadable picture.
        """
        position = self.first + index
        pair = self._pair(position)
        picture, caption = self.source[pair]
        pixel_seed, word_seed = np.random.SeedSequence([self.seed, 0, position]).generate_state(2, np.uint64).tolist()
        words = self.captions(caption, word_seed)
        return {"images": self._augment(picture, pixel_seed), **words, "labels": torch.tensor(pair)}

    def _pair(self, position: int) -> int:
        if not self.random:
            return position
        turn, place = divmod(position, len(self.source))
        if self._order is None or self._order[0] != turn:
            self._order = turn, np.random.default_rng([self.seed, 1, turn]).permutation(len(self.source))
        return int(self._order[1][place])

    def _augment(self, picture: Tensor, seed: int) -> Tensor:
        # torchvision's transforms draw from torch's default generator: lend it to this sample.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            if self.random and torch.rand(()) < 0.5:
                picture = horizontal_flip(picture)
            return self.finish(picture)


def pairs_to_see(
    method: Method, *, seed: int, count: int, pair_list: str = "", images: str = ""
) -> tuple[Callable[..., PretrainingPairs], dict[str, Tensor]]:
    """The training pairs, and the held-out pairs as one batch that is not augmented.

    Without a list: the first `count` pairs of the stream, each once as it is, and the first 512 of another stream.
    A list is shuffled at each pass and augmented as in fine-tuning; its last tenth, at most 512 pairs, is held out.

    Returns:
        A function of `first` and `count` that gives the dataset of those positions, and the batch.

    Raises:
        ConfigError: a list of fewer than four pairs, or a list without the folder of its pictures.
    """
    if bool(pair_list) != bool(images):
        raise ConfigError("a list of pairs and the folder of its pictures (--list, --images) go together; give both")
    source: Subset | WebStream
    unseen: Subset | WebStream
    if pair_list:
        pairs = ImageCaptionList(pair_list, images, method.augmented)
        if len(pairs) < 4:
            raise ConfigError(f"{pair_list}: {len(pairs)} pairs with a caption; pre-training needs four or more")
        split = len(pairs) - min(HELD_OUT, max(2, len(pairs) // 10))
        source, unseen = Subset(pairs, range(split)), Subset(pairs, range(split, len(pairs)))
    else:
        size = method.augmented.size
        source, unseen = WebStream(seed, size, count), WebStream(seed + 1_000_000, size, HELD_OUT)
    finish, random = (method.augmented.finish, True) if pair_list else (method.plain, False)
    training = partial(PretrainingPairs, source, method.captions, finish, seed=seed, random=random)
    samples = PretrainingPairs(unseen, method.captions, method.plain, seed=seed, first=0, count=len(unseen))
    return training, collate_pairs([samples[i] for i in range(len(samples))])


class ImageCaptionList(Dataset):
    """The pairs of a JSON list of records with `image` and `caption`; a caption without a word is left out."""

    def __init__(self, file: str | Path, images: str | Path, transform: ImageTransform):
        """Read the list; pictures are read on access.

        Args:
            file: the list (of CC3M, Visual Genome or SBU as IVT's authors prepared them).
            images: folder that `image` is relative to.
            transform: whose `read` resizes the pictures.

        Raises:
            AnnotationError: the file is not such a list. The message names the file and the record.
        """
        self.images, self.transform = Path(images), transform
        self._pairs: list[tuple[str, str]] = []
        for number, record in enumerate(read_records(Path(file))[0]):
            image, caption = record.get("image"), record.get("caption")
            if not isinstance(image, str) or not isinstance(caption, str):
                raise AnnotationError(
                    f"{file}: record {number}: found {', '.join(record)}; expected the texts 'image' and 'caption'"
                )
            if prepare_caption(caption):
                self._pairs.append((image, caption))

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self._pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        """The picture, uint8 [3, H, W], and the caption.

        Raises:
            ImageError: the picture cannot be read or lies outside the folder. The message names the file.
        """
        name, caption = self._pairs[index]
        return self.transform.read(resolve_image(self.images, name)), caption


def collate_pairs(samples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Join samples of `PretrainingPairs` to a batch, ids padded with 0 to the longest caption.

    Returns:
        The samples' entries with a leading batch axis, and `attention_mask` int64 [B, L].
    """
    batch = {
        key: pad_sequence([sample[key] for sample in samples], batch_first=True)
        if samples[0][key].dim() == 1
        else torch.stack([sample[key] for sample in samples])
        for key in samples[0]
    }
    return batch | {"attention_mask": (batch["caption_ids"] != 0).long()}
