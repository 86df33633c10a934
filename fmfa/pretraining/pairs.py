"""The pairs that pre-training sees: SimPEDES' identity-free stream, or any image-caption list."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from fmfa.data.pretraining_pairs import ImageCaptionList, PretrainingPairs, collate_pairs
from fmfa.errors import ConfigError
from fmfa.pretraining.methods import Method
from fmfa.simpedes.stream import web_pair

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
    if pair_list:
        found = ImageCaptionList(pair_list, images, method.augmented)
        if len(found) < 4:
            raise ConfigError(f"{pair_list}: {len(found)} pairs with a caption; pre-training needs four or more")
        kept = len(found) - min(HELD_OUT, max(2, len(found) // 10))
        source, unseen = Subset(found, range(kept)), Subset(found, range(kept, len(found)))
    else:
        size = method.augmented.size
        source, unseen = WebStream(seed, size, count), WebStream(seed + 1_000_000, size, HELD_OUT)
    finish, random = (method.augmented.finish, True) if pair_list else (method.plain, False)
    training = partial(PretrainingPairs, source, method.captions, finish, seed=seed, shuffle=random, flip=random)
    samples = PretrainingPairs(unseen, method.captions, method.plain, seed=seed, first=0, count=len(unseen))
    return training, collate_pairs([samples[i] for i in range(len(samples))])
